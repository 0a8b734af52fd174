"""Known segments of texts: what lies between two seams becomes tokens once, in the native core, whatever stands around it.

The other way to what ``incremental.py`` does with a store, by the same proof (``seams.py``): tokens between two seams depend on
what lies between, and on nothing else but whether a text or a section begins or ends there. The core keeps them
(``native/tokens``), makes only those that it does not know, and audits itself: the first text with its help and then one in
``AUDIT_EVERY`` is tokenized in full as well.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from kvatlas.observe.logs import get_logger
from kvatlas.tokens.encoding import TextTokenizer
from kvatlas.tokens.incremental import AUDIT_EVERY, EncoderStats, Incremental
from kvatlas.tokens.stores import StoreStats

if TYPE_CHECKING:
    from kvatlas import _native

_log = get_logger(__name__)

NativeFound = tuple[bytes, int, str | None]
"""Token ids as the bytes of an array('I'), how many of them were known, and why nothing known is used from here on."""


class KnownSegments:
    """What is known of all tokenizers' texts, within a bound of memory."""

    def __init__(self, bytes_max: int) -> None:
        """ImportError where there is no native core."""
        from kvatlas import _native

        self._encoder = _native.SegmentEncoder
        self._store = _native.SegmentStore(bytes_max)

    def encoder(self, tokenizer: TextTokenizer, name: str, *, audit_every: int = AUDIT_EVERY) -> SegmentEncoder | None:
        """Return an encoder of a tokenizer's texts; None where it has no native twin, or its texts no seams."""
        seams = tokenizer.seams()
        if tokenizer.native is None or not seams:
            return None
        specials = list(seams.specials.items())
        native = self._encoder(tokenizer.native, self._store, seams.letters, seams.newlines, specials, audit_every)
        return SegmentEncoder(native, tokenizer, name)

    def stats(self) -> StoreStats:
        """Return what is held."""
        return StoreStats(*self._store.held())


class SegmentEncoder:
    """Tokenizes texts with what is known of their segments; used as an IncrementalEncoder. Made by :class:`KnownSegments`."""

    def __init__(self, native: _native.SegmentEncoder, tokenizer: TextTokenizer, name: str) -> None:
        self.native = native
        self._tokenizer = tokenizer
        self._name = name

    @property
    def off(self) -> str | None:
        """Why nothing known is used any more; None while it is."""
        return self.native.off

    def stats(self) -> EncoderStats:
        return EncoderStats(*self.native.stats())

    def encode(self, text: str) -> Incremental:
        """Return a text's tokens. Costs what the unknown segments cost."""
        try:
            return self.told(self.native.tokens(text))
        except ValueError:
            return Incremental(self._tokenizer.ids(text), 0)  # it says what is wrong with this text

    def told(self, found: NativeFound) -> Incremental:
        """Return what the core has found as arrays; logs where it found itself wrong."""
        token_ids, known, off = found
        if off is not None:
            _log.error("a known token was wrong: nothing known is used for this tokenizer", tokenizer=self._name, problem=off)
        return Incremental(array("I", token_ids), known)

    def known(self, text: str) -> array[int]:
        """Return what is known, up to a seam: the first tokens of every text that begins with ``text``."""
        return array("I", self.native.prefix(text))
