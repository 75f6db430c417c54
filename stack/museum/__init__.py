"""Planted bugs, one file per subsystem, and the prover that runs gates against them."""
