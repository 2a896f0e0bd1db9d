"""Continued pretraining through Megatron's own ``pretrain()``.

``losses`` and ``ratio_watch`` are pure; ``arguments``, ``data_sets``, ``forward_step`` and ``metrics`` meet Megatron;
``pretrain`` puts them together and is the only caller of the engine.
"""
