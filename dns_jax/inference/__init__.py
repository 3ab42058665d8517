"""What becomes of a pruned network: a chain of layers, compacted, and run the fastest way."""
