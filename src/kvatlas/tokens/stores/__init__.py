"""Known text prefixes and their tokens."""
