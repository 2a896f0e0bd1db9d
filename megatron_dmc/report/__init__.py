"""Pictures and tables of runs: ``collect`` reads one, ``words`` and ``figures`` show it, ``write`` makes the files."""
