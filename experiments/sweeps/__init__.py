"""Many runs: what runs when, and what comes of it."""
