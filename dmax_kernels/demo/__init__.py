"""The demo: decode held-out problems with the shipped checkpoints, and show what came of it."""
