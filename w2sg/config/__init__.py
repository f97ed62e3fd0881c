"""What may be typed: options and their defaults, checks, and how Hydra is started."""

from w2sg.config.option import Options, option

__all__ = ["Options", "option"]
