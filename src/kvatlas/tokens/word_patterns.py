"""What a tokenizer's regular expressions may match across words: read well enough to prove that they do not."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from string import ascii_letters

import msgspec


class UnprovenError(Exception):
    """Seams in text are not proven; says why."""


class _Part(msgspec.Struct):
    """A part of a pattern, as Glushkov's construction sees it: what comes first and last, and whether it may be empty."""

    empty: bool
    first: set[int]
    last: set[int]
    looks: bool = False
    """Whether it looks ahead."""


class WordPattern:
    """Which of our characters (ASCII letters, newline, the space) a regular expression may match next to each other.

    Everything that it can match is covered; more than it matches may be. What it does not read, it refuses (UnprovenError).
    """

    def __init__(self, pattern: str, space: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._characters = (*ascii_letters, "\n", space)
        self._sets: list[frozenset[str]] = []
        self._follow: set[tuple[int, int]] = set()
        self.alone: set[str] = set()
        """Characters that match where they stand, whatever is around them."""
        self.empty = self._alternatives(ignore_case=False, top=True).empty
        if self._at < len(pattern):
            self._refuse()
        self.matched: set[str] = set().union(*self._sets)

    def holds(self, left: str, right: str) -> bool:
        """Whether a match may hold one of the characters ``left`` right before one of ``right``."""
        lefts, rights = frozenset(left), frozenset(right)
        return any(self._sets[one] & lefts and self._sets[two] & rights for one, two in self._follow)

    def _refuse(self) -> None:
        raise UnprovenError(f"pattern {self._pattern!r} is not understood at {self._at}")

    def _peek(self, length: int = 1) -> str:
        return self._pattern[self._at : self._at + length]

    def _take(self, text: str) -> bool:
        if self._pattern.startswith(text, self._at):
            self._at += len(text)
            return True
        return False

    def _alternatives(self, *, ignore_case: bool, top: bool = False) -> _Part:
        whole = _Part(False, set(), set())
        while True:
            part = self._branch(ignore_case=ignore_case)
            if top and not part.looks:
                for position in part.first & part.last:
                    self.alone |= self._sets[position]
            empty, looks = whole.empty or part.empty, whole.looks or part.looks
            whole = _Part(empty, whole.first | part.first, whole.last | part.last, looks)
            if not self._take("|"):
                return whole

    def _branch(self, *, ignore_case: bool) -> _Part:
        whole = _Part(True, set(), set())
        while self._at < len(self._pattern) and self._peek() not in "|)":
            part = self._repeated(self._atom(ignore_case=ignore_case))
            self._follow.update((one, two) for one in whole.last for two in part.first)
            whole = _Part(
                whole.empty and part.empty,
                whole.first | part.first if whole.empty else whole.first,
                whole.last | part.last if part.empty else part.last,
                whole.looks or part.looks,
            )
        return whole

    def _repeated(self, part: _Part) -> _Part:
        found = re.compile(r"[?*+]|\{(\d+)(,?)(\d*)\}").match(self._pattern, self._at)
        if found is None:
            return part
        self._at = found.end()
        if self._peek() in {"?", "+", "*", "{"}:
            self._refuse()  # lazy, possessive, or repeated again
        mark = found[0]
        if mark in {"?", "*"} or (found[1] is not None and int(found[1]) == 0):
            part = _Part(True, part.first, part.last, part.looks)
        if mark != "?":
            self._follow.update((one, two) for one in part.last for two in part.first)
        return part

    def _atom(self, *, ignore_case: bool) -> _Part:
        if self._take("(?!\\S)"):
            return _Part(True, set(), set(), looks=True)
        if self._take("("):
            if self._take("?i:"):
                ignore_case = True
            elif not self._take("?:") and self._peek() == "?":
                self._refuse()
            part = self._alternatives(ignore_case=ignore_case)
            if not self._take(")"):
                self._refuse()
            return part
        if self._take("["):
            inverted = self._take("^")
            members: set[str] = set()
            while not self._take("]"):
                members |= self._member(ignore_case=ignore_case)
            return self._position({*self._characters} - members if inverted else members)
        if self._peek() in {"^", "$", "*", "+", "?", "{", "]", "}"}:
            self._refuse()
        if self._take("."):
            return self._position({*self._characters} - {"\n"})
        return self._position(self._one(ignore_case=ignore_case)[0])

    def _member(self, *, ignore_case: bool) -> set[str]:
        """Read a character, a range or a class within brackets."""
        if self._peek() in {"", "["} or self._peek(2) == "&&":
            self._refuse()
        members, low = self._one(ignore_case=ignore_case)
        if self._peek() != "-" or self._peek(2) == "-]":
            return members
        self._at += 1
        if low is None or self._peek() in {"", "["}:
            self._refuse()
        _, high = self._one(ignore_case=ignore_case)
        if low is None or high is None:
            self._refuse()
            return set()
        return self._same({c for c in self._characters if low <= c <= high}, ignore_case)

    def _one(self, *, ignore_case: bool) -> tuple[set[str], str | None]:
        """Read a character or an escape: what of ours it matches, and the character if it is one."""
        character = self._peek()
        self._at += 1
        if character != "\\":
            return self._same({character} & {*self._characters}, ignore_case), character
        escape = self._peek()
        self._at += 1
        if escape in "pP":
            name = re.compile(r"\{(\w+)\}").match(self._pattern, self._at)
            if name is None:
                self._refuse()
            else:
                self._at = name.end()
                members = {c for c in self._characters if self._has(c, name[1])}
                return members if escape == "p" else {*self._characters} - members, None
        classes: dict[str, Callable[[str], bool]] = {
            "s": str.isspace,
            "d": str.isdecimal,
            "w": lambda c: c.isalnum() or c == "_",
        }
        if escape.lower() in classes:
            members = {c for c in self._characters if classes[escape.lower()](c)}
            return members if escape.islower() else {*self._characters} - members, None
        literal = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}.get(escape, escape)
        if not escape or (literal.isalnum() and literal == escape):
            self._refuse()
        return {literal} & {*self._characters}, literal

    def _has(self, character: str, name: str) -> bool:
        if name in {"Han", "Hiragana", "Katakana", "Hangul", "Arabic", "Hebrew", "Thai", "Cyrillic", "Greek"}:
            return False  # scripts without any of our characters
        if not re.fullmatch(r"L[ultmo]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?|C[cfson]?", name):
            self._refuse()
        return unicodedata.category(character).startswith(name)

    def _same(self, characters: set[str], ignore_case: bool) -> set[str]:
        """Add the other case where it counts as the same."""
        return {c for one in characters for c in (one.lower(), one.upper())} if ignore_case else characters

    def _position(self, characters: set[str]) -> _Part:
        self._sets.append(frozenset(characters))
        at = len(self._sets) - 1
        return _Part(False, {at}, {at})
