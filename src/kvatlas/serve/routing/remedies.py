"""What to do where a request's tokens were not known, by reason."""

from __future__ import annotations

from kvatlas.errors import TokenizationReason

_OF_THE_REQUEST = "an engine would refuse the request too"
_OF_THE_REMOTE = "see whether tokens.renderer.endpoints and tokens.service.address answer: kvatlas doctor"

REMEDIES = {
    TokenizationReason.NO_BACKEND: "say with tokens.models, tokens.directories or tokens.renderer.endpoints who tokenizes",
    TokenizationReason.UNKNOWN_MODEL: "name the model's tokenizer in tokens.models, or its other name in models",
    TokenizationReason.NOT_INSTALLED: 'pip install "kvatlas[tokens]", or set tokens.renderer.endpoints',
    TokenizationReason.BROKEN_TOKENIZER: "fetch the tokenizer's files again, or set tokens.renderer.endpoints",
    TokenizationReason.BAD_TEMPLATE: "give the engine's chat template in tokens.chatTemplates",
    TokenizationReason.BAD_MESSAGES: _OF_THE_REQUEST,
    TokenizationReason.BAD_TEXT: "an engine would refuse it too, or it is longer than tokens.textCharsMax",
    TokenizationReason.BAD_TRUNCATION: _OF_THE_REQUEST,
    TokenizationReason.TOO_MANY_TOKENS: "set tokens.maxModelLen where engines run with another --max-model-len",
    TokenizationReason.UNSUPPORTED: "set tokens.renderer.endpoints: only vLLM itself can tokenize it",
    TokenizationReason.BUSY: "raise tokens.workers or tokens.queueMax",
    TokenizationReason.TIMEOUT: "raise route.tokensTimeout or tokens.workers",
    TokenizationReason.UNAVAILABLE: _OF_THE_REMOTE,
    TokenizationReason.CIRCUIT_OPEN: _OF_THE_REMOTE,
    TokenizationReason.REFUSED: _OF_THE_REQUEST,
}


def remedy(problem: str) -> str | None:
    """Return what to do about a ``tokens_problem``; None for one that is no TokenizationReason."""
    try:
        return REMEDIES[TokenizationReason(problem)]
    except ValueError:
        return None
