"""Training: state, step, loop, checkpoints, preflight and the run directory."""
