"""What the method stands on: checks of arguments, exact counts, and the search for thresholds."""
