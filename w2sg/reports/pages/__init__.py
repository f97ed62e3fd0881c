"""Pages, one for each kind of run."""
