"""What the readers of the paper named beside it: other ways to a small network, one in each file."""
