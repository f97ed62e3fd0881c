"""Outputs of stages by content, and what keeps them whole."""
