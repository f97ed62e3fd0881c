"""A plan before the work: what a run would compute, how large that is, and whether it fits. Nothing is computed."""
