"""Files that are copied into exported folders, where they work without w2sg."""
