"""Fork and join: one state machine, the protocols that drive it, and the API in front of it."""
