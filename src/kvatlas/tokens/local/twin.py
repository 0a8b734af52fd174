"""The native core's twin of a loaded tokenizer: the same tokens, made without the interpreter; none where they are others."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import accumulate, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from kvatlas.observe.logs import get_logger

if TYPE_CHECKING:
    from kvatlas import _native

_log = get_logger(__name__)

PROBES = (
    "",
    "a",
    "Hello, world",
    " two  spaces ",
    "\n\n",
    "123 456",
    "naïve café",
    "日本語",
    "🙂 ok",
    "<s>",
    "def f(x):\n\treturn x\n",
)
"""Texts that show most of what tokenizers do differently."""
VOCABULARY_PROBES = 64
TOKENS_PER_PROBE = 24


def twin(backend: Any) -> _native.TextEncoder | None:
    """Return the twin of a ``tokenizers.Tokenizer`` without post-processor; None without a native core.

    It is read from the tokenizer's own JSON, and compared on texts, those of tokens from all over its vocabulary among them.
    Where it can't be read or tells other tokens there is none, and a warning says so: the wheel may be another version than
    the core was built with.
    """
    try:
        from kvatlas import _native
    except ImportError:
        return None
    try:
        made = _native.TextEncoder(backend.to_str(), backend.encode_special_tokens)
        differing = next((text for text in _probes(backend) if not _same(backend, made, text)), None)
    except ValueError as error:
        _log.warning("the native core does not read this tokenizer; it is used from Python", problem=str(error)[:300])
        return None
    if differing is not None:
        _log.warning("the native core tokenizes otherwise; this tokenizer is used from Python", probe=repr(differing[:80]))
        return None
    return made


def _probes(backend: Any) -> Iterator[str]:
    yield from PROBES
    yield " ".join(PROBES)
    step = max(1, backend.get_vocab_size() // (VOCABULARY_PROBES * TOKENS_PER_PROBE))
    ids = iter(range(0, backend.get_vocab_size(), step))
    while some := list(islice(ids, TOKENS_PER_PROBE)):
        yield backend.decode(some, skip_special_tokens=False)


def _same(backend: Any, ours: _native.TextEncoder, text: str) -> bool:
    right = backend.encode(text, add_special_tokens=False)
    ids, ends = ours.encode(text)
    return (
        ids == ours.ids(text) == array("I", right.ids).tobytes()
        and ends == array("I", accumulate(map(itemgetter(1), right.offsets), max)).tobytes()
    )
