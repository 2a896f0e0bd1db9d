"""Quality beside measured compression: texts by both paths, beside a reference; questions and benchmarks."""
