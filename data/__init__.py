"""Data tools: demo corpus, shard builder, checks, download of published shards, lossless case transform."""
