"""Where a text may be cut: tokens left of a seam don't depend on what follows, tokens right of it can be had from the rest.

Two kinds. *Behind an added token* (``<|im_end|>``): a text is first cut there, and each section becomes tokens on its own,
whatever the rest of the tokenizer does. *In text*: between a letter and a space before a letter ("word| word"), and between a
newline and a letter. These need a proof from the tokenizer's own data (:func:`_text_seams`): no step may take or look across
one. What the proof does not know has no seams in text; ``Seams.reasons`` says why.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from string import ascii_letters
from typing import Any, Protocol

import msgspec

from kvatlas.tokens.word_patterns import UnprovenError, WordPattern

SPECIALS_MAX = 2_000
WINDOW_CHARS = 256
AFTER_LETTER = "[ -~\\n]"
"""What must follow the letter behind a seam: nothing that a normalizer could combine with it."""
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Seam(msgspec.Struct, frozen=True):
    """A place in a text. ``special``: the id of the special token that ends there; None in text."""

    at: int
    special: int | None = None


class _Tokenizer(Protocol):
    def to_str(self) -> str: ...


class _Steps(msgspec.Struct):
    """What the proof has found so far of the way from text to model."""

    space: str = " "
    """What a space has become: itself or the mark of sentencepiece."""
    newlines: bool = True
    """Whether a newline before a letter is a seam."""
    splits: bool = False
    """Whether pieces always end at a seam in text, so that the model never sees both sides."""
    first: bool = True
    """Whether no step has made pieces yet."""
    byte_level: bool = False
    """Whether characters have become bytes."""


class Seams:
    """The seams of one tokenizer's texts."""

    def __init__(self, specials: Mapping[str, int], text: str | None, newlines: bool, reasons: tuple[str, ...]) -> None:
        """``specials``: texts of tokens behind which a text is cut. ``text``: letters beside which it is cut, or None."""
        self.specials = dict(specials)
        self.text = text is not None
        self.letters = text or ""
        self.newlines = text is not None and newlines
        self.reasons = reasons
        parts = []
        if self.specials:
            marks = "|".join(re.escape(content) for content in sorted(self.specials, key=len, reverse=True))
            begins = "".join(sorted({re.escape(content[0]) for content in self.specials}))
            parts.append(f"(?=[{begins}])(?:{marks})")  # most places are passed by a look at one character
        if text is not None:
            letter = f"[{text}]"
            parts.append(f"{letter}(?= {letter}{AFTER_LETTER})")
            if newlines:
                parts.append(f"\\n(?={letter}{AFTER_LETTER})")
        self._pattern = re.compile("|".join(parts)) if parts else None
        self._longest = max([1, *map(len, self.specials)])

    @classmethod
    def of(cls, tokenizer: Mapping[str, Any] | _Tokenizer) -> Seams:
        """Return what can be proven of a tokenizer: the content of its tokenizer.json, or a ``tokenizers.Tokenizer``."""
        normalize: Callable[[str], str] | None = None
        if isinstance(tokenizer, Mapping):
            data = tokenizer
        else:
            data = json.loads(tokenizer.to_str())
            normalizer = getattr(tokenizer, "normalizer", None)
            normalize = getattr(normalizer, "normalize_str", None)
        whole = _whole(data)
        if whole is not None:
            return cls({}, None, False, (whole,))
        specials, reasons = _specials(data)
        try:
            letters, newlines = _text_seams(data, normalize)
        except UnprovenError as reason:
            return cls(specials, None, False, (*reasons, f"none in text: {reason}"))
        return cls(specials, letters, newlines, reasons)

    @classmethod
    def none(cls, reason: str) -> Seams:
        return cls({}, None, False, (reason,))

    def __bool__(self) -> bool:
        return self._pattern is not None

    def before(self, text: str, end: int, start: int = 0) -> Iterator[Seam]:
        """Yield the seams of ``text[start:end]``, from the last to the first, that can be seen from ``text[:end]`` alone."""
        if self._pattern is None:
            return
        high = end
        below = end + 1
        while high > start:
            low = max(start, high - WINDOW_CHARS)
            # A window reaches back by the longest mark, so that none is missed at its border; and forward to see what follows.
            found = list(self._pattern.finditer(text, max(0, low - self._longest), min(end, high + 3)))
            for match in reversed(found):
                if start < match.end() < below:
                    below = match.end()
                    yield Seam(below, self.specials.get(match[0]))
            high = low


def tokens_before(token_ids: array[int], ends: array[int], seam: Seam) -> int | None:
    """Return how many tokens lie before a seam; None where no token ends exactly there, or more than one does.

    ``ends``: where each token ends in the text. Behind a special token, marks that a tokenizer puts before the next section
    (``▁``) may end there too, and belong to it.
    """
    at = bisect_left(ends, seam.at)
    if at == len(ends) or ends[at] != seam.at:
        return None
    if seam.special is not None:
        return at + 1 if token_ids[at] == seam.special else None
    if at + 1 < len(ends) and ends[at + 1] == seam.at:
        return None
    return at + 1


def _whole(data: Mapping[str, Any]) -> str | None:
    """Say why a text may not be cut anywhere, or None."""
    if (data.get("model") or {}).get("dropout"):
        return "none: with dropout, a text's tokens are random"
    for name in ("truncation", "padding"):
        if data.get(name):
            return f"none: the tokenizer has {name} on, which depends on the whole text"
    return None


def _specials(data: Mapping[str, Any]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the added tokens that end where they end, whatever follows, and what was left out."""
    added = [token for token in data.get("added_tokens") or [] if not token.get("normalized")]
    everything = "\0".join(["", *(token["content"] for token in added), ""])
    specials: dict[str, int] = {}
    left_out: list[str] = []
    for token in added:
        content = token["content"]
        if not content or "\0" in content:
            continue
        if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            left_out.append(content)
        elif len(specials) < SPECIALS_MAX and not re.search(re.escape(content) + "[^\0]", everything):
            specials[content] = token["id"]
        else:
            left_out.append(content)
    return specials, (f"none behind {len(left_out)} special tokens, such as {left_out[0]!r}",) if left_out else ()


def _text_seams(data: Mapping[str, Any], normalize: Callable[[str], str] | None) -> tuple[str, bool]:
    """Return the letters beside which a text may be cut, and whether behind newlines too; or raise UnprovenError.

    Let s be between a letter and a space that a letter follows. Then, for each step on the way to tokens:

    - Added tokens: none contains such a place, or strips or looks at letters beside it, so none lies across s.
    - Normalizers: each is one of those that work character by character between ASCII letters and spaces.
    - Pre-tokenizers: no match of a pattern can hold a letter and the space behind it (``WordPattern``), none looks back, and
      ahead only by ``(?!\\S)``, which sees the space. A search that can't pass s starts anew there: left of s it is decided by
      what is left, right of it by what is right. A pattern that matches letters at all matches each letter, so whether
      pieces end at s does not depend on the rest of the words.
    - Model: where pieces always end at s, it never sees both sides. Where they do not, only BPE is trusted: merges on both
      sides are independent if no entry of the vocabulary holds such a place. Others weigh the whole piece (Unigram adds up
      scores, whose rounding depends on all before), or take it whole (``ignore_merges``).

    What is put before a text or a piece (``prepend_scheme``, ``add_prefix_space``) or stripped there changes tokens at its
    start only, up to the next seam: ``incremental.py`` starts one seam early. The same holds for a newline before a letter,
    unless an added token begins with a letter: the newline would then end a section, and ``(?!\\S)`` see its end.
    """
    steps = _Steps()
    _normalizer(data.get("normalizer"), steps, normalize)
    _pre_tokenizer(data.get("pre_tokenizer"), steps)
    _added_tokens(data, steps)
    return _model(data, steps), steps.newlines


def _added_tokens(data: Mapping[str, Any], steps: _Steps) -> None:
    normalizes = bool(_sequence(data.get("normalizer"), "normalizers"))
    for token in data.get("added_tokens") or []:
        content = token["content"]
        if token.get("normalized") and normalizes and not content.isascii():
            raise UnprovenError(f"added token {content!r} is changed by the normalizer")
        # Only what is looked for behind the normalizer can mean a space by its mark.
        blank = r"[\s▁]" if token.get("normalized") and normalizes else r"\s"
        if re.search(rf"[A-Za-z]{blank}(?:[A-Za-z]|$)", content):
            raise UnprovenError(f"added token {content!r} goes across words")
        if re.search(r"(?:^|\s)[A-Za-z]", content):
            steps.newlines = False
        begins, ends = content[:1], content[-1:]
        beside = r"[A-Za-z\s▁]"
        if (
            (token.get("lstrip") and re.match(beside, begins))
            or (token.get("rstrip") and re.match(beside, ends))
            or (token.get("single_word") and (re.match(beside, begins) or re.match(beside, ends)))
        ):
            raise UnprovenError(f"added token {content!r} looks at the letters beside it")


def _sequence(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, sequences within sequences flattened."""
    flat: list[Mapping[str, Any]] = []
    todo = [part] if part else []
    while todo:
        step = todo.pop(0)
        if step["type"] == "Sequence":
            todo[:0] = step[name]
        else:
            flat.append(step)
    return flat


def _normalizer(part: Mapping[str, Any] | None, steps: _Steps, normalize: Callable[[str], str] | None) -> None:
    for step in _sequence(part, "normalizers"):
        match step["type"]:
            case "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" | "StripAccents" | "Strip" | "Prepend":
                pass
            case "BertNormalizer":
                steps.newlines = False
            case "Nmt":
                steps.newlines = False
            case "Precompiled":
                probe = " ".join(ascii_letters)
                if normalize is None or normalize(f"a {probe} a").replace("▁", " ").strip() != f"a {probe} a":
                    raise UnprovenError("a precompiled normalizer that can't be tried, or changes letters")
                steps.newlines = False
            case "Replace":
                _replace(step, steps)
            case other:
                raise UnprovenError(f"normalizer {other}")


def _replace(step: Mapping[str, Any], steps: _Steps) -> None:
    pattern, content = step["pattern"], step["content"]
    if pattern == {"String": " "} and content == "▁":
        steps.space = "▁"
    elif pattern == {"Regex": " {2,}"} and content in {" ", "▁"}:
        steps.newlines = False
    elif "String" in pattern and pattern["String"] and not re.search(r"[A-Za-z\s▁]", pattern["String"]):
        if not content.isascii():
            raise UnprovenError(f"normalizer Replace with {content!r}")
    else:
        raise UnprovenError(f"normalizer Replace of {pattern}")


def _pre_tokenizer(part: Mapping[str, Any] | None, steps: _Steps) -> None:
    for step in _sequence(part, "pretokenizers"):
        if steps.byte_level:
            raise UnprovenError(f"pre-tokenizer {step['type']} behind ByteLevel")
        match step["type"]:
            case "ByteLevel":
                _byte_level(step, steps)
            case "Split":
                _split_step(step, steps)
            case "Metaspace":
                _metaspace(step, steps)
            case "BertPreTokenizer" | "WhitespaceSplit" | "Whitespace":
                if steps.space != " ":
                    raise UnprovenError("a pre-tokenizer that splits at spaces, which a normalizer has replaced")
                steps.splits = True
                steps.newlines = False  # they are gone, so no token ends there
            case "Digits":
                pass
            case "Punctuation" if step.get("behavior", "Isolated") in {"Isolated", "Removed"}:
                pass
            case other:
                raise UnprovenError(f"pre-tokenizer {other}")
        steps.first = False


def _byte_level(step: Mapping[str, Any], steps: _Steps) -> None:
    if steps.space != " ":
        raise UnprovenError("ByteLevel behind a step that replaces spaces")
    if step.get("add_prefix_space") and not steps.first:
        steps.newlines = False
    if step.get("use_regex", True):
        _split(GPT2, steps)
    steps.byte_level = True


def _metaspace(step: Mapping[str, Any], steps: _Steps) -> None:
    replacement = step.get("replacement")
    if replacement != "▁":
        raise UnprovenError(f"pre-tokenizer Metaspace with {replacement!r}")
    steps.space = replacement
    if step.get("split", True):
        steps.splits = True
        steps.newlines = False  # pieces end at spaces only
    if not steps.first:
        steps.newlines = False  # something may be put before each piece


def _split_step(step: Mapping[str, Any], steps: _Steps) -> None:
    pattern = step["pattern"]
    behavior, invert = step.get("behavior"), bool(step.get("invert"))
    if "String" in pattern:
        string = pattern["String"]
        if string == " " and steps.space == "▁":
            return  # no spaces are left
        if re.search(r"[A-Za-z\s▁]", string) or behavior not in {"Isolated", "Removed"} or invert:
            raise UnprovenError(f"pre-tokenizer Split at {string!r}")
        return
    if (behavior, invert) not in {("Isolated", False), ("Isolated", True), ("Removed", True)}:
        raise UnprovenError(f"pre-tokenizer Split with {behavior}")
    _split(pattern["Regex"], steps, removes=behavior == "Removed")


def _split(regex: str, steps: _Steps, *, removes: bool = False) -> None:
    pattern = WordPattern(regex, steps.space)
    if pattern.empty:
        raise UnprovenError(f"pattern {regex!r} may match nothing")
    if pattern.holds(ascii_letters, steps.space):
        raise UnprovenError(f"pattern {regex!r} may match across words")
    matched = pattern.matched & set(ascii_letters)
    if matched and not pattern.alone.issuperset(ascii_letters):
        raise UnprovenError(f"pattern {regex!r} matches some letters only")
    if removes and not matched:
        raise UnprovenError(f"pattern {regex!r} removes letters")
    if pattern.holds("\n", ascii_letters):
        steps.newlines = False
    steps.splits |= bool(matched)


def _model(data: Mapping[str, Any], steps: _Steps) -> str:
    """Return the letters beside which a text may be cut, or raise UnprovenError."""
    model = data["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    vocabulary = model.get("vocab") or {}
    entries = [entry[0] for entry in vocabulary] if isinstance(vocabulary, list) else list(vocabulary)
    space, newline = ("Ġ", "Ċ") if steps.byte_level else (steps.space, "\n")
    known = set(entries)
    everything = "\0".join(entries)
    if re.search(f"[A-Za-z]{space}(?:[A-Za-z]|$|\\0)", everything):
        raise UnprovenError("entries of the vocabulary go across words")
    if re.search(f"{newline}[A-Za-z]", everything):
        steps.newlines = False
    if steps.splits:
        if kind not in {"BPE", "WordPiece", "WordLevel", "Unigram"}:
            raise UnprovenError(f"model {kind}")
        return ascii_letters
    if kind != "BPE":
        raise UnprovenError(f"model {kind} weighs pieces that go across words")
    for name in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UnprovenError(f"{name} looks at pieces that go across words")
    bytes_known = len(known & set(_byte_alphabet())) == 256 if steps.byte_level else False
    if model.get("byte_fallback"):
        bytes_known = known.issuperset(f"<0x{byte:02X}>" for byte in range(256))
    if not bytes_known and model.get("unk_token") not in known:
        raise UnprovenError("the vocabulary lacks characters, which then vanish from a text")
    letters = "".join(letter for letter in ascii_letters if letter in known)
    if space not in known or not letters:
        raise UnprovenError("the vocabulary lacks spaces or letters")
    if newline not in known:
        steps.newlines = False
    return letters


def _byte_alphabet() -> Iterator[str]:
    """Yield the 256 characters that stand for bytes in byte-level vocabularies (GPT-2's bytes_to_unicode)."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    yield from map(chr, plain)
    yield from map(chr, range(256, 256 + 256 - len(plain)))
