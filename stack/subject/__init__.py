"""The adapter of `stack train`: what its gates judge, made from the run's own parts."""
