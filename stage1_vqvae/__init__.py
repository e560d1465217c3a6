"""Stage 1: a VQ-VAE that compresses lensing images into a small latent grid, with the noise law of the data beside it."""
