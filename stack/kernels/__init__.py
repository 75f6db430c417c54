"""Fast operations, each beside a slow reference with the same arguments;
`dispatch` says which one runs and why.
"""

# float32 logits that the head holds at a time; more gains nothing, less starves the matrix products
HEAD_CHUNK_BYTES = 128 * 2**20
