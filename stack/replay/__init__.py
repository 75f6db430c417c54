"""Replaying: repro bundles of failed gates, re-runs of records, and the resume certificate."""
