"""What evaluations have in common: sets of images, what is measured of them, scores beside their floors, tables, curves."""
