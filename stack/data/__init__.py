"""From raw text to batches: corpora, tokenizers, shards, sampling order and the reader (data
loader).
"""
