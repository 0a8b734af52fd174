"""Embedded engines: a simulated engine as a real process, in real time, with an engine's API, metrics and KV events."""
