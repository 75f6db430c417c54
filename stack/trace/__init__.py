"""Looks into a model while it computes: which operation, at which place, made a number what it is."""
