"""Prompts become tokens elsewhere: at an engine's render endpoint, or at a tokenization service over gRPC."""
