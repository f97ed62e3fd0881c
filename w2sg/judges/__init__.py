"""Judges of replies."""
