"""A run and its verbs."""
