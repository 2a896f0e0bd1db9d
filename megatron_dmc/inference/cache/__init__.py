"""The memory of all sequences: blocks, who holds them, and what they amount to."""
