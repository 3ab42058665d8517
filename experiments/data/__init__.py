"""Data sets: prepared, read, cut to size."""
