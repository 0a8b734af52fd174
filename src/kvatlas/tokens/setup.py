"""From settings to tokenization."""

from __future__ import annotations

from kvatlas.config import TokenSettings
from kvatlas.observe.metrics import Metrics
from kvatlas.tokens.results import Backend
from kvatlas.tokens.tokenization import Policy, Tokenization, Waiting


def make_tokenization(settings: TokenSettings, metrics: Metrics) -> Tokenization:
    """Return what the settings ask for: tokenizers in this process first, then a renderer, then a service.

    ConfigError where a file that they name is missing. Nothing is loaded and nobody is asked before the first prompt.
    """
    backends: list[Backend] = []
    waiting = Waiting(Policy(settings.policy), settings.budget, settings.timeout)
    return Tokenization(backends, metrics, waiting=waiting, workers=settings.workers, queue_max=settings.queue_max)
