"""Data: rows from anywhere, splits by id, label noise, packed rows and batches."""
