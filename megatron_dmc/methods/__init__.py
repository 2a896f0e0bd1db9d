"""Methods of cache compression: who decides, and what the decisions do to attention and to the loss."""
