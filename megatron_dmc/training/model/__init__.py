"""Megatron's GPT model with compressing attention: layer spec, model class and builder.

Reading order: ``microbatch`` (what travels with one forward pass), ``attention``, ``decision_statistics`` (how the
compression loss crosses layers and pipeline stages), ``gpt_model``, ``builder``.
"""
