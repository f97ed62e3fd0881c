"""One file per method; each reads top to bottom like its paper's algorithm."""
