"""From files, datasets and built-in scenes to batches."""
