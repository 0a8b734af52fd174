"""kvatlas: which KV-cache blocks sit on which LLM engine, and who holds the longest prefix of a prompt."""

from __future__ import annotations

__version__ = "0.1.0"
