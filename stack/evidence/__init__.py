"""Builds and writes records, accepts them into the ledger, compares and re-runs them."""
