"""Stage 2: a diffusion model of the frozen latents, its samplers, and the `Generator` that users hold."""
