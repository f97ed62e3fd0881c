"""Experiments whose answer is known: closed forms of the field, run through the same code as every other experiment."""
