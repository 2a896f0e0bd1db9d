"""Quality beside measured compression: perplexity by both paths, and whether the paths agree."""
