"""Everything that the U-Net is told besides the noisy latents and the time. A leaf: imports nothing of ours."""
