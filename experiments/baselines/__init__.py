"""What the paper's readers named: other ways to a small network, one in each file."""
