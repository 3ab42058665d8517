"""A run: its plan, its phases, and the step that they take."""
