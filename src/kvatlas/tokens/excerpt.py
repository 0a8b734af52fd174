"""The first or last tokens of a long text, without those of the rest: for prompts of megabytes that are cut to a few tokens.

A piece of the text is tokenized that ends (or begins) at a seam; where it has too few tokens, a larger one. Texts without
seams, and those that are not much longer than the piece, are tokenized in full.
"""

from __future__ import annotations

from array import array
from itertools import islice

from kvatlas.tokens.encoding import TextTokenizer
from kvatlas.tokens.seams import Seam, Seams, tokens_before

CHARS_PER_TOKEN = 16
"""How long tokens may be for the first piece to have enough of them."""
MARGIN_CHARS = 4_096
GROWTH = 4
"""How much larger each next piece is: all of them together cost at most a third more than the last one."""
SEARCH_CHARS = 16_384
"""How far beyond a piece's border a seam is looked for."""


def is_far_longer(text: str, count: int) -> bool:
    """Whether an excerpt of ``count`` tokens can save anything."""
    return len(text) > 2 * (count * CHARS_PER_TOKEN + MARGIN_CHARS)


def first_tokens(
    tokenizer: TextTokenizer, seams: Seams, text: str, count: int, *, margin_chars: int = MARGIN_CHARS
) -> array[int]:
    """Return a text's first ``count`` tokens or more; all of them where it has no more, or no seam."""
    chars = count * CHARS_PER_TOKEN + margin_chars
    while 2 * chars < len(text):
        seam = next(seams.before(text, chars, chars - min(chars, SEARCH_CHARS)), None)
        if seam is None:
            break
        tokens = tokenizer.ids(text[: seam.at])
        if len(tokens) >= count:
            return tokens
        chars *= GROWTH
    return tokenizer.ids(text)


def last_tokens(
    tokenizer: TextTokenizer, seams: Seams, text: str, count: int, *, margin_chars: int = MARGIN_CHARS
) -> array[int]:
    """Return a text's last ``count`` tokens or more; all of them where it has no more, or no seams."""
    chars = count * CHARS_PER_TOKEN + margin_chars
    while 2 * chars < len(text):
        border = len(text) - chars
        # The piece begins a seam earlier than what is taken of it: a text's start may change the tokens there.
        found = list(islice(seams.before(text, border, max(0, border - SEARCH_CHARS)), 2))
        if len(found) < 2:
            break
        cut, start = found
        encoding = tokenizer.encode(text[start.at :])
        before = tokens_before(encoding.token_ids, encoding.ends, Seam(cut.at - start.at, cut.special))
        if before is None:
            break
        if len(encoding.token_ids) - before >= count:
            return encoding.token_ids[before:]
        chars *= GROWTH
    return tokenizer.ids(text)
