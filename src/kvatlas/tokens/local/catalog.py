"""Where a model's tokenizer is: a model's name to a directory, its revision and its format.

A name comes from a request, so it is never made into a path: directories are walked once, and names are looked up in what was
found. ``docs/tokenizers.md`` tells the rules.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvatlas.config import TokenSettings
from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.local.formats import LOOKED_FOR, Kind, is_tokenizer_file, kind_of

if TYPE_CHECKING:
    from kvatlas.tokens.local.hub import Hub

_CACHED_REPOSITORY = re.compile(r"models--([^-].*)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_./-]{0,199}")

NAME_CHARS_MAX = 512
DEPTH_MAX = 6
ENTRIES_MAX = 200_000
"""Entries of directories that one walk looks at; what lies behind them is not found."""
RESCAN_S = 30.0
"""An unknown name leads to another walk, and to another question to the hub, at most this often."""
MISSES_MAX = 1024
"""Names that the hub did not have, remembered."""
HUB_ASKS_MAX = 16
"""Questions to the hub within RESCAN_S: names come from requests, and nobody is to have it asked at will."""
FETCHED_MAX = 64
"""Models whose tokenizer one process fetches: nobody is to fill a disk at will either."""


class Found(msgspec.Struct, frozen=True):
    """A model's tokenizer on this machine."""

    model: str
    directory: Path
    revision: str | None
    """The hub's commit, where the directory is a snapshot of the hub; else None: ``formats.digest`` tells it."""
    kind: Kind

    @property
    def name(self) -> str:
        """Which tokenizer: its name on the hub, or its directory's own (answers carry it: no path)."""
        return (_repository_of(self.directory) if self.revision else None) or self.directory.name


class _Walk:
    """One look through the directories: which names there are, and where."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.names: dict[str, list[Path]] = {}
        self.aliases: dict[str, Path] = {}
        """Names of directories that are a model themselves: they count after all others."""
        self.bare: dict[str, Path] = {}
        """Directories without a tokenizer, by the name that they would have."""
        self.refused: dict[str, str] = {}
        """Links that lead out of the directories."""
        self.entries_left = ENTRIES_MAX
        self._roots = roots
        for root in roots:
            self._visit(root, (), frozenset())

    def _visit(self, directory: Path, parts: tuple[str, ...], above: frozenset[tuple[int, int]]) -> None:
        """``above``: the directories that led here, so that links in a circle end."""
        if self.entries_left <= 0:
            return
        try:
            status = os.stat(directory)
            if (status.st_dev, status.st_ino) in above:
                return
            above |= {(status.st_dev, status.st_ino)}
            with os.scandir(directory) as scan:
                entries = []
                for entry in scan:
                    self.entries_left -= 1
                    if self.entries_left <= 0:
                        break
                    entries.append(entry)
        except OSError:
            return
        cached = _CACHED_REPOSITORY.fullmatch(directory.name)
        if cached and any(entry.name == "snapshots" for entry in entries):
            self.names.setdefault(cached[1].replace("--", "/"), []).append(directory)
            return
        files = {entry.name for entry in entries if not _is_directory(entry)}
        name = "/".join(parts)
        if kind_of(files) is not None:
            if parts:
                self.names.setdefault(name, []).append(directory)
                return
            for alias in _own_names(directory):
                self.aliases.setdefault(alias, directory)
        elif parts:
            self.bare.setdefault(name, directory)
        if len(parts) < DEPTH_MAX:
            self._descend(entries, parts, above)

    def _descend(self, entries: Sequence[os.DirEntry[str]], parts: tuple[str, ...], above: frozenset[tuple[int, int]]) -> None:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(".") or not _is_directory(entry):
                continue
            path = Path(entry.path)
            if entry.is_symlink() and not _within(path, self._roots):
                self.refused["/".join((*parts, entry.name))] = f"{path} is a link that leads out of tokens.directories"
                continue
            self._visit(path, (*parts, entry.name), above)


class Catalog:
    """Finds tokenizers by tokens.models, tokens.directories and, where it is allowed, the hub. Safe for threads."""

    def __init__(self, settings: TokenSettings, *, hub: Hub | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """``hub``: used only with tokens.hub; by default one with huggingface_hub's own settings."""
        self._settings = settings
        self._clock = clock
        self._hub: Hub | None = None
        roots = [Path(directory).expanduser().resolve() for directory in settings.directories]
        if settings.hub:
            from kvatlas.tokens.local.hub import Hub as DefaultHub

            self._hub = hub or DefaultHub()
            roots.append(self._hub.cache_directory.resolve())
        self._roots = list(dict.fromkeys(roots))
        self._homes = [*self._roots, *(root.parents[1] for root in self._roots if _repository_of(root))]
        """Where files may lie: a snapshot's are links to blobs beside it."""
        self._walk: _Walk | None = None
        self._walked_at = 0.0
        self._walking = threading.Lock()
        self._lock = threading.Lock()
        self._misses: OrderedDict[str, tuple[float, TokenizationError]] = OrderedDict()
        self._asks: list[float] = []
        self._fetched: set[str] = set()
        self.walks = 0

    def find(self, model: str) -> Found:
        """Return where a model's tokenizer is. Costs a dictionary's lookup and one listing; seldom a walk or the hub's answer.

        Raises TokenizationError, which says what was looked through.
        """
        target = self._settings.models.get(model)
        if target is None:
            return self._find_name(model, model)
        path = Path(target).expanduser()
        if not (path.is_absolute() or target.startswith(("./", "../")) or path.is_dir()):
            return self._find_name(model, target)
        problems: list[str] = []
        found = self._open(model, self._revision_of(model, target), path, None, problems)
        if found is None:
            raise _unknown(model, f"tokens.models leads to {path}: {'; '.join(problems)}", "correct tokens.models")
        return found

    def models(self) -> list[Found]:
        """Return all tokenizers on this machine, by name: those of tokens.models, and all in the directories. May walk them."""
        walk = self._current(rescan=True)
        named = sorted({*self._settings.models, *walk.names})
        found: list[Found] = []
        shown: set[Path] = set()
        for model in [*named, *(alias for alias in walk.aliases if alias not in named)]:
            try:
                place = self.find(model) if model in self._settings.models else self._find_here(model)
            except TokenizationError:
                continue
            if model in named or place.directory not in shown:
                found.append(place)
                shown.add(place.directory)
        return found

    # -- by name --------------------------------------------------------------------------------------------------------

    def _find_name(self, model: str, name: str) -> Found:
        if not 0 < len(name) <= NAME_CHARS_MAX or not name.isprintable():
            raise _unknown(model, "this is no name of a model", f"a name of 1 to {NAME_CHARS_MAX} printable characters")
        try:
            return self._find_here(model, name)
        except TokenizationError as error:
            if self._walk_is_old():
                self._current(rescan=True)
                return self._find_name(model, name)
            if self._hub is None:
                raise
            return self._ask_hub(model, name, error)

    def _find_here(self, model: str, name: str | None = None) -> Found:
        name = name or model
        walk = self._current()
        revision = self._revision_of(model, name)
        problems: list[str] = []
        places = walk.names.get(name, [])
        for place in [*places, *([walk.aliases[name]] if name in walk.aliases else [])]:
            found = self._open(model, revision, place, self._homes, problems)
            if found is not None:
                return found
        if problems:
            raise _unknown(model, "; ".join(problems), "bring its tokenizer files, or correct tokens.revisions")
        if name in walk.refused:
            raise _unknown(model, walk.refused[name], "name its directory in tokens.models")
        if name in walk.bare:
            problem = f"{walk.bare[name]} has none of {LOOKED_FOR}"
            raise _unknown(model, problem, "bring its tokenizer files")
        what = "of this name" if name in (None, model) else f"named {name!r:.100} (so tokens.models says)"
        raise _unknown(model, f"no tokenizer {what} in {self._looked_through()}", self._remedy())

    def _looked_through(self) -> str:
        told = [f"{root}" if root.is_dir() else f"{root} (is not there)" for root in self._roots]
        walk = self._walk
        if walk is not None and walk.entries_left <= 0:
            told.append(f"[more than {ENTRIES_MAX} entries: not all was looked at]")
        return ", ".join(["tokens.models", *told])

    def _remedy(self) -> str:
        return "name its directory in tokens.models or tokens.directories" + (
            "" if self._settings.hub else ", or allow tokens.hub"
        )

    def _revision_of(self, model: str, name: str) -> str | None:
        return self._settings.revisions.get(model) or self._settings.revisions.get(name)

    def _open(
        self, model: str, revision: str | None, directory: Path, roots: Sequence[Path] | None, problems: list[str]
    ) -> Found | None:
        """Return what a directory holds; None adds to ``problems``. ``roots``: what its files may not lead out of."""
        commit = directory.name if _repository_of(directory) else None
        if (directory / "snapshots").is_dir():
            commit = _commit(directory, revision, problems)
            if commit is None:
                return None
            directory = directory / "snapshots" / commit
        elif commit is not None and revision is not None and _COMMIT.fullmatch(revision) and revision != commit:
            problems.append(f"{directory} is not revision {revision}")
            return None
        try:
            names = _files(directory, roots, problems)
        except OSError as error:
            problems.append(f"{directory} cannot be read ({error.strerror})")
            return None
        kind = kind_of(names)
        if kind is None:
            problems.append(f"{directory} has none of {LOOKED_FOR}")
            return None
        return Found(model, directory, commit, kind)

    # -- walks ----------------------------------------------------------------------------------------------------------

    def _walk_is_old(self) -> bool:
        return self._walk is None or self._clock() - self._walked_at >= RESCAN_S

    def _current(self, rescan: bool = False) -> _Walk:
        """Return what the last walk found. Others wait while one walks."""
        walk = self._walk
        if walk is not None and not (rescan and self._walk_is_old()):
            return walk
        with self._walking:
            if self._walk is None or (rescan and self._walk_is_old()):
                self._walk = _Walk(self._roots)
                self._walked_at = self._clock()
                self.walks += 1
            return self._walk

    # -- the hub --------------------------------------------------------------------------------------------------------

    def _ask_hub(self, model: str, name: str, here: TokenizationError) -> Found:
        assert self._hub is not None
        now = self._clock()
        with self._lock:
            missed = self._misses.get(name)
            if missed is not None and now < missed[0]:
                known = missed[1]
                raise TokenizationError(known.reason, known.field, known.problem, known.remedy)
            self._asks = [at for at in self._asks if now - at < RESCAN_S]
            if len(self._asks) >= HUB_ASKS_MAX:
                problem = f"{here.problem}; the hub was asked {HUB_ASKS_MAX} times within {RESCAN_S:g} s"
                raise TokenizationError(TokenizationReason.BUSY, "model", problem, "try again later")
            if name not in self._fetched and len(self._fetched) >= FETCHED_MAX:
                problem = f"{here.problem}; {FETCHED_MAX} models' tokenizers were fetched from the hub already"
                raise TokenizationError(here.reason, "model", problem, "bring its tokenizer files, or restart kvatlas")
            self._asks.append(now)
        problems: list[str] = []
        try:
            directory = self._hub.fetch(name, self._revision_of(model, name))
            found = self._open(model, None, directory, None, problems)
            if found is None:
                raise _unknown(model, f"on the hub: {'; '.join(problems)}", self._remedy())
        except TokenizationError as error:
            problem = f"{here.problem}; {error.problem}"
            told = TokenizationError(error.reason, "model", problem, error.remedy)
            with self._lock:
                self._misses[name] = (self._clock() + RESCAN_S, told)
                while len(self._misses) > MISSES_MAX:
                    self._misses.popitem(last=False)
            raise told from None
        with self._lock:
            self._fetched.add(name)
        return found


# -- directories --------------------------------------------------------------------------------------------------------


def _unknown(model: str, problem: str, remedy: str) -> TokenizationError:
    shown = repr(model if len(model) <= 100 else f"{model[:100]}...")
    return TokenizationError(TokenizationReason.UNKNOWN_MODEL, "model", f"{shown}: {problem}", remedy)


def _within(path: Path, roots: Sequence[Path]) -> bool:
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return False
    return any(real.is_relative_to(root) for root in roots)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _files(directory: Path, roots: Sequence[Path] | None, problems: list[str]) -> set[str]:
    """Return the names of a directory's files. Tokenizer files that can't be read, or lead out of ``roots``, are problems."""
    names = set()
    with os.scandir(directory) as scan:
        for entry in scan:
            if is_tokenizer_file(entry.name):
                if not _is_file(entry):
                    problems.append(f"{entry.path} is a broken link" if entry.is_symlink() else f"{entry.path} is no file")
                    continue
                if roots is not None and entry.is_symlink() and not _within(Path(entry.path), roots):
                    problems.append(f"{entry.path} is a link that leads out of tokens.directories")
                    continue
            names.add(entry.name)
    return names


def _repository_of(directory: Path) -> str | None:
    """Return the hub's name of a snapshot's directory; None where it is none."""
    parents = directory.parents
    if len(parents) < 2 or directory.parent.name != "snapshots" or not _COMMIT.fullmatch(directory.name):
        return None
    cached = _CACHED_REPOSITORY.fullmatch(parents[1].name)
    return cached[1].replace("--", "/") if cached else None


def _own_names(directory: Path) -> list[str]:
    """Return what a directory that is itself a model is called: as on the hub, or by its last one or two names."""
    repository = _repository_of(directory)
    if repository is not None:
        return [repository]
    return [f"{directory.parent.name}/{directory.name}", directory.name]


def _commit(repository: Path, revision: str | None, problems: list[str]) -> str | None:
    """Return which snapshot of a cached repository a revision is. Without refs (a copied cache), an only snapshot is main."""
    snapshots = repository / "snapshots"
    try:
        there = sorted(entry.name for entry in os.scandir(snapshots) if _is_directory(entry))
    except OSError:
        there = []
    wanted = revision or "main"
    if wanted in there:
        return wanted
    if not _REVISION.fullmatch(wanted) or ".." in wanted:
        problems.append(f"{wanted!r} is no revision")
        return None
    try:
        commit = (repository / "refs" / wanted).read_text(encoding="ascii")[:64].strip()
    except (OSError, ValueError):
        commit = there[0] if revision is None and len(there) == 1 else ""
    if commit in there:
        return commit
    shown = ", ".join(there[:3]) or "none"
    problems.append(f"{repository} has no snapshot of revision {wanted} (there: {shown})")
    return None
