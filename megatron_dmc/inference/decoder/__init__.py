"""The model that decodes: one body for every checkpoint, and attention between its projections."""
