"""Stable Diffusion's file formats in and out: single files in the original layout, folders, model cards."""
