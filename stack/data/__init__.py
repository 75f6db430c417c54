"""From raw text to batches: corpora, tokenizers, shards, samplers and the data loader."""
