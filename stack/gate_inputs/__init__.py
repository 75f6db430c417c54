"""Inputs of the preflight gates, made from a run's own parts."""
