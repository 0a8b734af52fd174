"""The write path: sources -> frames -> one worker a stream (in order, gaps healed) -> decode -> index."""
