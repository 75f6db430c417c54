"""Training: the trainer, the loop, the step, and what they are made of."""
