"""The gates inside trainers that are not ours: `plain`, `huggingface`, `lightning`,
and a plugin for pytest.

Nothing here is imported by `import stackproof.contracts.callbacks`,
so that each works without the others' libraries.
"""
