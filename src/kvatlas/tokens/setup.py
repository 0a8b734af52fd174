"""From settings to tokenization."""

from __future__ import annotations

from pathlib import Path

from kvatlas.config import PrefixStoreSettings, TokenSettings
from kvatlas.observe.logs import get_logger
from kvatlas.observe.metrics import Metrics
from kvatlas.tokens.local.backend import LocalBackend
from kvatlas.tokens.local.catalog import Catalog
from kvatlas.tokens.local.huggingface import load_huggingface
from kvatlas.tokens.local.loaded import LoadedTokenizers
from kvatlas.tokens.local.mistral import load_mistral
from kvatlas.tokens.remote.render import RendererBackend
from kvatlas.tokens.remote.service import ServiceBackend
from kvatlas.tokens.results import Backend
from kvatlas.tokens.segments import KnownSegments
from kvatlas.tokens.stores import PrefixStore
from kvatlas.tokens.stores.chunks import ChunkStore
from kvatlas.tokens.stores.trie import TrieStore
from kvatlas.tokens.tokenization import Policy, Tokenization, Waiting

_log = get_logger(__name__)


def make_tokenization(settings: TokenSettings, metrics: Metrics) -> Tokenization:
    """Return what the settings ask for: tokenizers in this process first, then a renderer, then a service.

    ConfigError where a file that they name can't be read. Nothing is loaded and nobody is asked before the first prompt.
    """
    local = make_local(settings) if settings.models or settings.directories or settings.hub else None
    backends: list[Backend] = [] if local is None else [local]
    if settings.renderer.endpoints:
        backends.append(RendererBackend(settings.renderer))
    if settings.service.address is not None:
        backends.append(ServiceBackend(settings.service))
    return Tokenization(
        backends,
        metrics,
        local=local,
        waiting=Waiting(Policy(settings.policy), settings.budget, settings.timeout),
        workers=settings.workers,
        queue_max=settings.queue_max,
        warm=tuple(settings.models)[: settings.loaded_max],
    )


def make_local(settings: TokenSettings) -> LocalBackend:
    """Return the tokenizers of this process, with their prefix store."""
    for directory in settings.directories:
        if not Path(directory).expanduser().is_dir():
            _log.warning("a directory of tokenizers is not there", directory=directory, remedy="correct tokens.directories")
    tokenizers = LoadedTokenizers(
        Catalog(settings),
        {"huggingface": load_huggingface, "mistral": load_mistral},
        settings.loaded_max,
        chat_templates=settings.chat_templates,
        trust_request_template=settings.trust_request_template,
    )
    return LocalBackend(
        tokenizers,
        _make_store(settings.store),
        segments=_make_segments(settings.store),
        text_chars_max=settings.text_chars_max,
        max_model_len=settings.max_model_len,
    )


def _make_store(settings: PrefixStoreSettings) -> PrefixStore | None:
    if settings.kind in ("segments", "trie"):
        return TrieStore(settings.bytes_max)
    if settings.kind == "chunks":
        return ChunkStore(settings.bytes_max, settings.chunk_chars)
    return None


def _make_segments(settings: PrefixStoreSettings) -> KnownSegments | None:
    if settings.kind != "segments":
        return None
    try:
        return KnownSegments(settings.bytes_max)
    except (ImportError, AttributeError):
        return None  # no native core: `kvatlas doctor` says why
