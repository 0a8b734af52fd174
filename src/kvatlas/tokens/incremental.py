"""Tokens of a text of which a store knows the beginning: only the rest is tokenized, and never a wrong token comes of it."""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left

import msgspec

from kvatlas.observe.logs import get_logger
from kvatlas.tokens.encoding import Encoding, TextTokenizer
from kvatlas.tokens.seams import Seam, Seams, tokens_before
from kvatlas.tokens.stores import Known, PrefixStore

_log = get_logger(__name__)

TEXT_CHARS_MIN = 512
"""Shorter texts are tokenized in full: that costs less than looking them up."""
OVERLAP_CHARS = 96
"""How much before the seam is tokenized again, at least, to be compared with what is stored."""
SEARCH_CHARS = 16_384
"""How far back a seam is looked for; what is known beyond it is not worth it."""
AUDIT_EVERY = 256


class Incremental(msgspec.Struct, frozen=True):
    """A text's tokens, all of them. ``tokens_stored``: how many came from the store."""

    token_ids: array[int]
    tokens_stored: int


class EncoderStats(msgspec.Struct):
    """What an encoder did, counted since it was made."""

    full: int = 0
    """Texts tokenized in full: short, unknown, without a seam, or differing; audits are not counted here."""
    assisted: int = 0
    """Texts of which the beginning came from the store."""
    tokens_stored: int = 0
    """Tokens that came from the store."""
    mismatches: int = 0
    """Texts where tokens of the overlap differed from those stored; tokenized in full."""
    audits: int = 0
    audit_failures: int = 0


class _Cut(msgspec.Struct, frozen=True):
    """A seam, and the tokens before it."""

    at: int
    tokens: int
    special: int | None


class IncrementalEncoder:
    """Tokenizes texts of one space. Calls may come from several threads."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        seams: Seams,
        store: PrefixStore,
        space: str,
        *,
        text_chars_min: int = TEXT_CHARS_MIN,
        overlap_chars: int = OVERLAP_CHARS,
        audit_every: int = AUDIT_EVERY,
    ) -> None:
        self._tokenizer = tokenizer
        self._seams = seams
        self._store = store
        self._space = space
        self._text_chars_min = text_chars_min
        self._overlap_chars = overlap_chars
        self._audit_every = audit_every
        self._lock = threading.Lock()
        self._stats = EncoderStats()
        self._off: str | None = None if seams else "; ".join(seams.reasons) or "no seams are known"

    @property
    def off(self) -> str | None:
        """Why the store is not used; None where it is."""
        return self._off

    def stats(self) -> EncoderStats:
        with self._lock:
            return msgspec.structs.replace(self._stats)

    def encode(self, text: str) -> Incremental:
        """Return a text's tokens. Costs what the unknown rest costs, and at most one full tokenization more than that."""
        if self._off is not None or len(text) < self._text_chars_min:
            self._count_full()
            return Incremental(self._tokenizer.ids(text), 0)
        known = self._store.find(self._space, text)
        result = self._assisted(text, known) if known.chars >= self._text_chars_min else None
        if result is None:
            return Incremental(self._learn(text).token_ids, 0)
        encoding, stored = result
        if self._audit_due() and not self._audit(text, encoding):
            self._count_full()
            return Incremental(self._tokenizer.ids(text), 0)
        with self._lock:
            self._stats.assisted += 1
            self._stats.tokens_stored += stored
        if known.chars < len(text):
            self._store.add(self._space, text, encoding)
        return Incremental(encoding.token_ids, stored)

    def known(self, text: str) -> array[int]:
        """Return what the store knows, cut at a seam: the first tokens of every text that begins with ``text``."""
        if self._off is not None:
            return array("I")
        known = self._store.find(self._space, text)
        for seam in self._seams.before(text, known.chars, max(0, known.chars - SEARCH_CHARS)):
            cut = _cut(known, seam)
            if cut is not None:
                return known.token_ids[: cut.tokens]
        return array("I")

    def learn(self, text: str) -> None:
        """Tokenize a text in full, and remember it."""
        self._learn(text)

    def _count_full(self) -> None:
        with self._lock:
            self._stats.full += 1

    def _learn(self, text: str) -> Encoding:
        self._count_full()
        encoding = self._tokenizer.encode(text)
        if self._off is None and _rises(encoding.ends, len(text)):
            self._store.add(self._space, text, encoding)
        return encoding

    def _assisted(self, text: str, known: Known) -> tuple[Encoding, int] | None:
        """Return a text's tokens with the help of what is known, and how many were; None where that does not work."""
        cut: _Cut | None = None  # what comes before it is taken from the store
        check: Seam | None = None  # from here to the cut, stored tokens are compared with new ones
        start: Seam | None = None  # from here on the text is tokenized; a seam earlier, since a text's start may change tokens
        for seam in self._seams.before(text, known.chars, max(0, known.chars - SEARCH_CHARS)):
            if cut is None:
                cut = _cut(known, seam)
            elif check is not None:
                start = seam
                break
            elif seam.at <= cut.at - self._overlap_chars:
                check = seam
        if cut is None or check is None or start is None:
            return None
        rest = self._tokenizer.encode(text[start.at :])
        if not _rises(rest.ends, len(text) - start.at):
            return None
        again = _cut(rest, Seam(cut.at - start.at, cut.special))
        if again is None or not _agree(known, cut, rest, again, start.at, check.at):
            with self._lock:
                self._stats.mismatches += 1
            return None
        token_ids, ends = known.token_ids[: cut.tokens], known.ends[: cut.tokens]
        token_ids.extend(rest.token_ids[again.tokens :])
        ends.extend(array("I", [end + start.at for end in rest.ends[again.tokens :]]))
        return Encoding(token_ids, ends), cut.tokens

    def _audit_due(self) -> bool:
        """Whether this result is checked: the first one, and then one in ``audit_every``."""
        with self._lock:
            return self._stats.assisted % self._audit_every == 0

    def _audit(self, text: str, encoding: Encoding) -> bool:
        """Compare with full tokenization. Where it differs, the store is off from then on, and the space forgotten."""
        right = self._tokenizer.ids(text) == encoding.token_ids
        with self._lock:
            self._stats.audits += 1
            if not right:
                self._stats.audit_failures += 1
                self._off = "an audit failed: tokens from the store differed from those of the whole text"
        if not right:
            _log.error("a stored token was wrong: the prefix store is off for this tokenizer", tokenizer=self._space)
            self._store.forget(self._space)
        return right


def _cut(of: Known | Encoding, seam: Seam) -> _Cut | None:
    tokens = tokens_before(of.token_ids, of.ends, seam)
    return None if tokens is None else _Cut(seam.at, tokens, seam.special)


def _agree(known: Known, cut: _Cut, rest: Encoding, again: _Cut, start: int, check: int) -> bool:
    """Whether stored and new tokens that end behind ``check`` are the same up to the cut; the last one in any case."""
    ours = min(bisect_left(known.ends, check + 1), cut.tokens - 1)
    count = cut.tokens - ours
    if count > again.tokens:
        return False
    theirs = again.tokens - count
    if known.token_ids[ours : cut.tokens] != rest.token_ids[theirs : again.tokens]:
        return False
    both = zip(known.ends[ours : cut.tokens], rest.ends[theirs : again.tokens], strict=True)
    return all(mine == other + start for mine, other in both)


def _rises(ends: array[int], chars: int) -> bool:
    """Whether ends never fall and stay within the text: what stores and cuts rely on."""
    values = ends.tolist()
    return not values or (values[-1] <= chars and values == sorted(values))
