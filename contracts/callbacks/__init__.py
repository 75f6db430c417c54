"""Adapters of other trainers: `plain`, `huggingface`, `lightning`, and a plugin for pytest.

The first three derive from `run.GatedRun`. `import stackproof.contracts.callbacks` imports
none of them, so that each works without the libraries of the others.
"""
