"""w2sg: weak-to-strong generalization experiments as cached stages, composed by Hydra and trained by Lightning."""

__version__ = "0.1.0"
