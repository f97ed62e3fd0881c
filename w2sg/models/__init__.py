"""Where a model comes from, how it is loaded and checked, heads, policies."""
