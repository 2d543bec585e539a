"""Data tools: demo corpus, shards, checks, published shards, lossless case transform."""
