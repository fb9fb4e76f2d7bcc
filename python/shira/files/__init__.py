"""Files that are there whole or not at all, and checkpoints, read a tensor at a time."""
