"""Sections of reports, one file for each thing that a reader sees."""
