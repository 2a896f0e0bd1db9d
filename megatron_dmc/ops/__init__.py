"""Operations of Dynamic Memory Compression on tensors: no configuration, no engine. See ``README.md`` here."""
