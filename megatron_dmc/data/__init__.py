"""Text in, Megatron's indexed data sets out, and the checks that keep damaged ones away from training.

``corpus`` reads documents, ``tokenizer`` turns them into ids, ``prepare`` writes ``PREFIX.bin``, ``PREFIX.idx`` and the
manifest ``PREFIX.json``, ``indexed`` is the file format, ``check`` verifies it. Nothing here needs torch or Megatron.
"""
