"""From a dataclass to a command line and back."""
