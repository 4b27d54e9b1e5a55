"""The embedding cache: turns texts into vectors, from memory or through `inference`.

Run it with `python -m services.embedding_cache`. Other code calls `headrace.embedding.v1` or
`POST /v1/embeddings`, and imports nothing from here. Start with `README.md`, then `domain.py`.
"""
