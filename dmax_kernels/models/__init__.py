"""The tiny block-diffusion model, its task and its checkpoints."""
