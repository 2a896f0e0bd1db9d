"""Directories of runs: the names of their files, the steps done in them, the metrics of training and how it ended."""
