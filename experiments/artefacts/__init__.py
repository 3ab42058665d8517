"""Pruned networks from files, and what is done to them."""
