"""Held-out loss, sampling, suites of prompts, memorization, and early stopping."""
