"""The simulator of strong lenses: the priors of a preset -> parameters -> clean image -> observed image."""
