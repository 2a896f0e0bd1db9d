"""What a model is, without its weights: its shape, its tensors' names on both sides, how they are fused and cut."""
