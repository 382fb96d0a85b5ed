"""A decoder language model as pure functions, and its checkpoints."""
