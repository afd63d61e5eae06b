"""Images with labels: prepared once, read by step, changed at random in training."""
