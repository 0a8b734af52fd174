"""Tokenizers in this process."""
