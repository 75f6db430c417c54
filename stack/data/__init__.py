"""From raw text to batches: corpora, tokenizers, shards and the reader."""
