"""What a model is worth on held-out text, what it writes, and when more training stops paying."""
