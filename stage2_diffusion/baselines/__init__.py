"""Other systems beside ours: trained and scored on the same budget, or timed in turns with it."""
