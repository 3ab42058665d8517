"""What a step, a network and a call cost."""
