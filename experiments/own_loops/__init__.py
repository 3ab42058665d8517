"""Pruning in loops of training as users write them."""
