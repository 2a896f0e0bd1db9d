"""Where this package meets the machine and Megatron's moving parts.

``host`` lets Megatron run on a machine without CUDA, ``megatron_compat`` holds what is adapted in Megatron, by name
and once; ``processes`` says which rank of a job this process is, ``doctor`` what is wrong with an installation.
Nothing here acts when it is imported.
"""
