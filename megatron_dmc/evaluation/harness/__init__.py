"""Standard benchmarks on the compressed engine: lm-evaluation-harness from local files, and programs that are run.

``continuations`` scores texts, ``generation`` writes them, ``adapter`` makes a model of ours one of the harness,
``task_files`` reads what is asked, ``run`` calls the harness; ``programs`` and ``pass_at_1`` do without it. Only
``adapter`` and ``run`` import it.
"""
