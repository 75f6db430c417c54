"""Fast operations, each with a slow reference that takes the same arguments. `dispatch` selects the
kernels.
"""

# float32 logits in memory at a time; more is not faster, less makes the matrix products too small
HEAD_CHUNK_BYTES = 128 * 2**20
