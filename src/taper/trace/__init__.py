"""Step traces: every planned step with all that its decision depended on, so that it can be decided again."""
