"""Conversion of Llama checkpoints between Hugging Face and Megatron, proved by a comparison.

One table (``param_map``) names every tensor on both sides; ``layouts`` says how fused tensors are cut, as pure
functions. ``hf_to_megatron`` and ``megatron_to_hf`` stream through them one tensor at a time; ``verify`` compares any
two checkpoints; ``source`` opens one as a whole model.
"""
