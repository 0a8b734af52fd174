"""Tokenizers elsewhere: an engine's render endpoint, a tokenization service."""
