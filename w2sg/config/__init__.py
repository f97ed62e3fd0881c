"""What may be typed: schema, options, checks, and how Hydra is started."""
