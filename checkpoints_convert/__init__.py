"""Conversion of Llama checkpoints between Hugging Face and Megatron, proved by a comparison.

The table of tensor names is ``megatron_dmc.models.tensors``, and ``megatron_dmc.checkpoint.source`` reads either side.
``hf_to_megatron`` and ``megatron_to_hf`` stream through them one tensor at a time; ``verify`` compares any two
checkpoints.
"""
