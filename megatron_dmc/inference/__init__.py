"""Decoding with the compressed cache: model, paged cache, engine. Imports neither Megatron nor transformers."""
