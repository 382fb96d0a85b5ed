"""A decoder of language models as pure functions, and its checkpoints."""
