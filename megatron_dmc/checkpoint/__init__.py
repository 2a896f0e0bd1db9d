"""Checkpoint files read as data: bounded, checked, and never executed.

``pickles`` describes a pickle without importing anything; ``torch_file``, ``torch_dist`` and ``legacy`` read what
torch and Megatron write through it, ``safetensors_file`` reads safetensors. ``guard`` checks a checkpoint before
Megatron opens it, ``unpickling`` builds objects for Megatron from bytes that were described, ``saved_arguments``
tells what model a checkpoint holds, ``manifest`` whether it is whole; ``source`` opens it as a model whose tensors are
read one by one.
"""
