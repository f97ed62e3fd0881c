"""Stages, LightningModules, devices, loggers."""
