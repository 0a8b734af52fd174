"""The native core (native/python), used through `kvatlas.index.native`. `make lint` compares this with the built module."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, final

from typing_extensions import Buffer

from kvatlas.sim.engines import EngineState, Happening, Kind
from kvatlas.types import DpRank, PodId, Tier

__all__ = [
    "VERSION",
    "Call",
    "Core",
    "Door",
    "EncoderThreads",
    "History",
    "Mailbox",
    "Picker",
    "Scores",
    "SegmentEncoder",
    "SegmentStore",
    "SimulatedEngines",
    "Stream",
    "TextEncoder",
    "block_keys",
    "decode",
    "piece_hashes",
]

VERSION: str

_Extra: TypeAlias = tuple[int, str, bytes]
"""Offset in tokens, kind, value."""

_Spec: TypeAlias = tuple[str, int | None, int | None]
"""Kind, window in tokens, block size in tokens."""

_Stored: TypeAlias = tuple[
    Sequence[int],
    int | None,
    Buffer | Sequence[int],
    int | None,
    str,
    int,
    _Spec | None,
    str | None,
    Sequence[Sequence[_Extra]] | None,
]
"""Hashes, parent, token ids, block size in tokens, tier, group, spec, adapter, extras (one list a hash)."""

_Removed: TypeAlias = tuple[Sequence[int], str, int | None]
"""Hashes, tier, group."""

_Cleared: TypeAlias = tuple[str | None]
"""Tier."""

_Event: TypeAlias = _Stored | _Removed | _Cleared

_Report: TypeAlias = tuple[int, int, int, int, int, int, int, int, int]
"""The fields of ``kvatlas.types.ApplyReport``, in order."""

_Applied: TypeAlias = tuple[int, _Report, int, int, int, float | None, list[str]]
"""Rank, report, stored, removed and cleared events, last timestamp, tiers stored to."""

_Name: TypeAlias = tuple[str, int]
"""Pod, rank."""

_Info: TypeAlias = tuple[_Name, str | None, list[tuple[int, _Spec]], int | None, int, int, float | None]
"""Name, model, groups, stale (a code), blocks, orphans, timestamp of the last event."""

_Holder: TypeAlias = tuple[str, int, str, int, int]
"""Pod, rank, tier, group, copies."""

_Found: TypeAlias = tuple[list[tuple[int, int, int]], list[list[_Holder]], list[tuple[int, _Name]], list[_Info]]
"""Runs of keys (first, past the last, number of its holders), holders by number, promises by position, streams."""

_Question: TypeAlias = tuple[list[str] | None, str | None, str, list[tuple[str, float]], float, float]
"""Pods, model, scorer, weights by tier, weight of other tiers, factor for stale streams."""

_Row: TypeAlias = tuple[PodId, DpRank, str | None, float, int, int, int, list[tuple[Tier, int]], int, int | None]
"""Pod, rank, model, score, matched blocks, matched and cached tokens, blocks by tier, speculative blocks, stale (a code)."""

def block_keys(
    recipe: str, root: bytes, tokens: Buffer | Sequence[int], block_size_tokens: int, extras: Sequence[tuple[int, bytes]]
) -> bytes:
    """Return the keys of a prompt's whole blocks after ``root``, by our own recipe, an engine's algorithm or llm-d's.

    They are the bytes of an array('Q').

    ``extras``: block and what stands for its extras, serialized, in the order of blocks.
    """

def decode(payload: bytes, wire: str) -> tuple[float | None, int | None, list[_Event]] | None:
    """Return a payload's timestamp, rank and events; None for one that the Python decoder has to judge."""

def piece_hashes(content: Buffer, piece_bytes: int, root: int, added: Mapping[int, bytes]) -> bytes:
    """Return the chained hashes of a prompt's content in pieces: the bytes of an array('Q').

    ``added``: what a piece has besides, by where it starts.
    """

@final
class History:
    """Which blocks were routed to whom; endpoints are small numbers, used again once they are forgotten."""

    def __new__(cls, bytes_max: int) -> History: ...
    def matches(self, hashes: Buffer | Sequence[int]) -> list[tuple[int, int]]:
        """Return how many leading blocks each endpoint got, of those that got any."""

    def record(self, endpoint: int, hashes: Buffer | Sequence[int], capacity_blocks: int) -> None:
        """Note that a prompt was routed to an endpoint whose cache holds so many blocks."""

    def forget(self, endpoint: int) -> None: ...
    def stats(self) -> tuple[int, int, int, int, int, int]:
        """Return the fields of ``kvatlas.route.prefix.history.HistoryStats``, in order."""

@final
class Scores:
    """What the candidates hold of one prompt."""

    blocks: int
    """Whole blocks of the prompt."""
    blocks_held: int
    """Of those, how many at least one stream holds or was promised."""

    def __len__(self) -> int: ...
    def to_dict(self) -> dict[str, int]:
        """Return the matched blocks of every stream that has some, by ``str(kvatlas.types.Stream)``."""

    def keys(self) -> bytes:
        """Return the keys of the prompt's whole blocks, as the bytes of an array of 64-bit integers."""

    def rows(self) -> list[_Row]:
        """Return all that there is to tell, one row a stream."""

@final
class Call:
    """One client's request, as a door tells it. Dropped before its answer has ended, its connection is cut."""

    @property
    def number(self) -> int:
        """Whose letters are its own."""

    def read(self, bytes_max: int) -> None:
        """Read the body: a letter ``body`` comes."""

    def forward(
        self,
        authority: str,
        target: str,
        routing: list[tuple[str, str]],
        body: bytes | None,
        reply: list[tuple[str, str]],
        hidden: list[str],
    ) -> None:
        """Send it to an engine: a letter ``answered`` or ``failed`` comes. ``body`` None: as it came.

        ``routing``, ``reply``: headers to set on the request and on its answer; ``hidden``: headers of the answer to leave out.
        An answer of status 503 is held until :meth:`pass_on`, or until it is forwarded again.
        """

    def pass_on(self) -> None:
        """Pass on the answer that is held: a letter ``passed`` comes."""

    def respond(self, status: int, headers: list[tuple[str, str]], body: bytes, close: bool) -> None:
        """Answer it; no further letter comes. ``close``: take nothing more from its connection."""

    def cut(self) -> None:
        """Close its connection at once."""

@final
class Door:
    """A listener with its clients' connections, in threads that never take the interpreter.

    Its letters are ``(number of the request, kind, ...)``; after the kind comes:

    arrived      Call, (method, target, headers by name), body, what is wrong with it, length is ambiguous
    body         body, what is wrong with it (too_large, too_slow, framing)
    answered     status, headers by name, whether it is passed on; a letter first_token and a letter passed come then
    first_token  seconds since it was sent
    passed       end (whole, broken, client_gone), the end of the body, seconds since it was sent
    failed       (how, problem)
    gone         nothing: the client left before an answer began
    fetched      status, body
    """

    def __new__(
        cls,
        host: str,
        port: int,
        share: bool,
        threads: int,
        connections_max: int,
        engine_connections_max: int,
        times: tuple[float, float, float, float, float, float],
        dropped: tuple[list[str], list[str]],
        mailbox: Mailbox,
        ticket: int,
    ) -> Door:
        """Listen at an IP address. ``times``, in seconds: client, keep alive, connect, first byte, idle, engine keep alive.

        ``dropped``: names of headers of requests and of answers that are not passed on. OSError where it cannot listen.
        """

    def address(self) -> tuple[str, int]:
        """Return where it listens."""

    def stop_accepting(self) -> None:
        """Take no new connections; close the others as they become idle."""

    def close(self) -> None:
        """Cut what is left, and end its threads."""

    def fetch(self, authority: str, target: str, headers: list[tuple[str, str]], bytes_max: int) -> int:
        """GET something from an engine: a letter ``fetched`` or ``failed`` comes, of the number that is returned."""

_Refusal: TypeAlias = tuple[int, list[tuple[str, str]], bytes]
"""Status, headers, body."""

@final
class Stream:
    """A stream of the endpoint picker that waits for its decision, given once. Dropped without one, it fails."""

    def send(
        self,
        headers: list[tuple[str, str]],
        body: bytes | None,
        replies: list[tuple[str, list[tuple[str, str]]]],
        hidden: list[str],
    ) -> None:
        """Send the request on. ``headers``: to set on it, one is the destination; ``body`` None: as it came.

        ``replies``: headers to set on the answer, by the address of whoever serves it, the first is the target's; ``hidden``:
        headers of the answer to leave out.
        """

    def refuse(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """Tell the client why its request goes nowhere."""

@final
class Picker:
    """The endpoint picker's port (ext_proc, health checks), served by threads that never take the interpreter.

    Its letters are ``(number of the stream, kind, ...)``; after the kind comes:

    asked        Stream, path without query, headers by name, body (None: not shown), subset (None: not said)
    answered     headers by name, who answers where that is not the target; only where there is something to be learnt
    first_token  seconds since it was sent
    ended        how, problem, None where it was not sent, else: (whole, status, Envoy would tell its end, it is a stream of
                 events, the end of the body, seconds since it was sent)
    idle         nothing; number 0: all connections have ended after :meth:`stop_accepting`
    """

    def __new__(
        cls,
        host: str,
        port: int,
        threads: int,
        streams_max: int,
        body_bytes_max: int,
        headers_bytes_max: int,
        held_bytes_max: int,
        consumed: list[str],
        telling: list[str],
        refusals: tuple[_Refusal, _Refusal, _Refusal, _Refusal, _Refusal, _Refusal],
        mailbox: Mailbox,
        ticket: int,
    ) -> Picker:
        """Take a port at an IP address. OSError where it cannot be had.

        ``consumed``: headers of clients that are never passed on; ``telling``: headers of answers that somebody wants to know;
        ``refusals``: of too many streams, headers that are too long, a body that is too long, too many bodies held, a body
        that never came, a subset hint that is none.
        """

    def port(self) -> int:
        """Return the port that it has."""

    def serve(self) -> None:
        """Take connections."""

    def set_ready(self, ready: bool) -> None:
        """Let health checks say whether requests should be sent here."""

    def streams(self) -> int:
        """Return how many are in progress."""

    def held_bytes(self) -> int:
        """Return how long the bodies are that are held."""

    def stop_accepting(self) -> None:
        """Take no new streams: a letter ``idle`` comes when the others have ended."""

    def close(self) -> None:
        """Cut what is left, and end its threads."""

@final
class Mailbox:
    """What threads of the core tell an event loop."""

    def __new__(cls) -> Mailbox: ...
    def fileno(self) -> int:
        """Return the descriptor that can be read while letters wait."""

    def take(self) -> list[tuple[int, Any]]:
        """Take all letters: ticket and content, in the order in which they were put."""

@final
class TextEncoder:
    """A tokenizer, from its JSON. Texts' own tokens as the bytes of an array('I'). ValueError for what has none."""

    def __new__(cls, json: str, special_as_text: bool) -> TextEncoder: ...
    def ids(self, text: str) -> bytes: ...
    def encode(self, text: str) -> tuple[bytes, bytes]:
        """Return the tokens, and where they end, in characters."""

@final
class SegmentStore:
    """Tokens of what lies between seams, of any number of tokenizers."""

    def __new__(cls, bytes_max: int) -> SegmentStore: ...
    def held(self) -> tuple[int, int, int, int, int]:
        """Return entries, bytes of text, tokens, estimated memory in bytes, evicted entries."""

@final
class SegmentEncoder:
    """A tokenizer that remembers segments of texts. Every call releases the GIL."""

    def __new__(
        cls,
        encoder: TextEncoder,
        store: SegmentStore,
        letters: str,
        newlines: bool,
        specials: list[tuple[str, int]],
        audit_every: int,
    ) -> SegmentEncoder: ...
    @property
    def off(self) -> str | None: ...
    def tokens(self, text: str) -> tuple[bytes, int, str | None]:
        """Return tokens, how many of them were known, and why nothing known is used from here on."""

    def prefix(self, text: str) -> bytes:
        """Return the known ones of a text's first tokens."""

    def stats(self) -> tuple[int, int, int, int, int, int]:
        """Return what ``EncoderStats`` has."""

@final
class EncoderThreads:
    """Threads that make tokens without taking the interpreter."""

    def __new__(cls, threads: int) -> EncoderThreads: ...
    def submit(self, encoder: SegmentEncoder, text: str, mailbox: Mailbox, ticket: int) -> None:
        """Have ``((tokens, known, off), seconds)`` put into a mailbox; what went wrong, as a text, where there are none."""

    def close(self) -> None: ...

@final
class SimulatedEngines:
    """Engines on one virtual clock: `kvatlas.sim.native`. ValueError for what the clock or the engines there are refuse."""

    def __new__(cls, happening: type[Happening], kinds: Sequence[Kind], state: type[EngineState]) -> SimulatedEngines: ...
    def join(
        self,
        costs: tuple[float, float, float, float, float],
        gpu_blocks: int,
        block_size_tokens: int,
        step_tokens_max: int,
        running_max: int,
        prefix_caching: bool,
        tiers: Sequence[tuple[str, int, float, float]],
        at_s: float,
    ) -> int:
        """Add an engine, of which all has been checked; return its number. `tiers`: name, blocks, seconds a block, latency."""

    def leave(self, engine: int, at_s: float) -> list[int]: ...
    def add(self, engine: int, job: tuple[int, Buffer | Sequence[int], int, int, Buffer | Sequence[int]], at_s: float) -> None:
        """Give an engine a job `(id, keys, prompt tokens, output tokens, token ids)`, which has been checked."""

    def slow(self, engine: int, factor: float, at_s: float) -> None:
        """Let steps take so many times as long, which has been checked."""

    def abort(self, engine: int, job: int, at_s: float) -> bool: ...
    def reset_cache(self, engine: int, at_s: float) -> bool: ...
    def run(self, until_s: float, events: int) -> tuple[float, list[Happening]]:
        """Go on. `events`: as `kvatlas.sim.engines.Events`."""

    def metrics(self, engine: int) -> EngineState:
        """How busy it was when its last step ended."""

    def state(self, engine: int) -> EngineState: ...

@final
class Core:
    """An index. ``now_s`` and ``end_s`` are of one clock, in seconds. Every call releases the GIL."""

    def __new__(
        cls,
        block_size_tokens: int,
        seed: str,
        mode: str = "kvatlas",
        *,
        ttl_s: float,
        blocks_max: int,
        bytes_max: int,
        orphans_max: int,
        retired_max: int,
        promises_max: int,
    ) -> Core: ...
    def apply_payloads(
        self, pod: str, dp_rank: int, payloads: Sequence[bytes], wire: str, model: str | None, now_s: float
    ) -> tuple[int, list[_Applied]]:
        """Decode and apply payloads up to the first that the Python decoder has to judge; return how many, and what it did."""

    def apply(
        self, pod: str, dp_rank: int, events: Sequence[_Event], model: str | None, timestamp_s: float | None, now_s: float
    ) -> _Report:
        """Apply one batch of events, in order."""

    def lookup(self, keys: Buffer | Sequence[int], pods: list[str] | None, now_s: float) -> _Found:
        """Find who holds each key. ``keys``: fastest as a buffer of unsigned 64-bit integers."""

    def score_tokens(
        self, tokens: Buffer | Sequence[int], root: int, extras: Sequence[_Extra], question: _Question, now_s: float
    ) -> Scores:
        """Score a prompt. ``tokens``: fastest as a buffer of unsigned 32-bit integers."""

    def score_prompts(
        self, prompts: Sequence[tuple[Buffer | Sequence[int], int, Sequence[_Extra]]], question: _Question, now_s: float
    ) -> list[Scores]:
        """Score prompts, each with its root and extras."""

    def score_keys(
        self,
        keys: Buffer | Sequence[int],
        prompt_tokens: int,
        question: _Question,
        now_s: float,
        confined: bool = False,
    ) -> Scores:
        """Score a prompt by the keys of its blocks. ``confined``: a stream of another model is no candidate."""

    def promise(self, pod: str, dp_rank: int, keys: Buffer | Sequence[int], end_s: float) -> None:
        """Note that a stream will soon hold these keys."""

    def mark(self, pod: str, dp_rank: int, stale: int | None) -> None:
        """Say why a stream's entries may be wrong (a code of the caller's), or that they are right."""

    def drop(self, pod: str, dp_rank: int, forget: bool) -> int:
        """Drop all that a stream holds; return entries dropped."""

    def expire(self, now_s: float) -> int:
        """Evict what is due, and clean up; return blocks evicted."""

    def snapshot(self, now_s: float) -> bytes:
        """Return the whole index but its promises."""

    def restore(self, snapshot: bytes, stale_codes: int, now_s: float) -> None:
        """Become what the index of a snapshot was; codes of stale streams are below ``stale_codes``.

        ValueError(problem, remedy) leaves the index as it was.
        """

    def streams(self) -> list[_Info]:
        """Return what is known of each stream."""

    def stats(self) -> Sequence[int]:
        """Return the fields of ``kvatlas.types.IndexStats``, in order."""
