"""The simulator: a ground-truth step cost and an event loop that drive the shipped controller."""
