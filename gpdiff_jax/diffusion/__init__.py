"""In: tokens of trained parameters and the prompts of their regions. Out: a denoiser that turns noise into tokens."""
