"""What both stages stand on. Imports neither of them."""
