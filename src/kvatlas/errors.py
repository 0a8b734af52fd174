"""Every error that kvatlas raises.

KvatlasError
├── ConfigError          a setting is unknown or wrong: path, allowed values
├── TokensError          token input that cannot be keyed: position, value
├── RequestError         a query that cannot be answered as asked: field, remedy
│   └── TokenizationError    a prompt whose tokens cannot be told: reason (a metric's label)
├── RouteError           a request that is sent nowhere: HTTP status, what the client is told
│   ├── NoEndpointError      nobody is there to take it: 503
│   ├── NoCachedPrefixError  it was to be sent only where its prefix is: 412
│   ├── SaturatedError       everybody is busy: 429
│   ├── ExpiredError         it waited too long: 429
│   └── StoppingError        the router stops: 503
├── DecodeError          bytes that are no event payload: reason (a metric's label)
├── RecordingError       a capture file that is no capture: path, offset
├── SnapshotError        a snapshot that cannot be restored: problem, remedy
├── SourceError          an event source cannot do its work: endpoint, remedy
└── WorkerError          a worker process cannot start: number, problem
"""

from __future__ import annotations

import enum


class KvatlasError(Exception):
    """Base of all errors here; its text says what to do next."""


class ConfigError(KvatlasError):
    """A setting is unknown or has a bad value. Nothing was started."""

    def __init__(self, path: str, problem: str, allowed: str) -> None:
        self.path = path
        self.problem = problem
        self.allowed = allowed
        super().__init__(f"{path}: {problem}; allowed: {allowed}")


class TokensError(KvatlasError):
    """Token input that cannot be keyed."""

    def __init__(self, problem: str, position: int | None = None) -> None:
        self.problem = problem
        self.position = position
        where = "" if position is None else f" at position {position}"
        super().__init__(f"token_ids{where}: {problem}; pass integers 0 to 4294967295 in a list, array('I') or numpy array")


class RequestError(KvatlasError):
    """A query that cannot be answered as asked."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        self.field = field
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{field}: {problem}; {remedy}")


class TokenizationReason(enum.Enum):
    """Why a prompt's tokens cannot be told: short and bounded in number, as a metric's label."""

    NO_BACKEND = "no_backend"
    """Nothing is configured that could tokenize."""
    UNKNOWN_MODEL = "unknown_model"
    """No tokenizer of this model was found."""
    NOT_INSTALLED = "not_installed"
    """A package is missing."""
    BROKEN_TOKENIZER = "broken_tokenizer"
    """The tokenizer's files can't be read."""
    BAD_TEMPLATE = "bad_template"
    """The chat template fails, or is missing, or is not allowed."""
    BAD_MESSAGES = "bad_messages"
    """The chat is not one that the engine would take."""
    BAD_TEXT = "bad_text"
    """The text is no Unicode text, or too long."""
    BAD_TRUNCATION = "bad_truncation"
    TOO_MANY_TOKENS = "too_many_tokens"
    """The engine would refuse the prompt."""
    UNSUPPORTED = "unsupported"
    """A content that only the engine can tokenize, such as images without a renderer."""
    BUSY = "busy"
    """Too much waits already."""
    TIMEOUT = "timeout"
    UNAVAILABLE = "unavailable"
    """A remote tokenizer does not answer."""
    CIRCUIT_OPEN = "circuit_open"
    """A remote tokenizer failed so often that it is left alone for a while."""
    REFUSED = "refused"
    """A remote tokenizer refused the prompt."""

    @property
    def transient(self) -> bool:
        """Whether the same prompt may succeed later."""
        return self in _TRANSIENT

    @property
    def of_backend(self) -> bool:
        """Whether another backend may know more: it is not the prompt's own fault."""
        return self.transient or self in _OF_BACKEND


_TRANSIENT = frozenset(
    {TokenizationReason.BUSY, TokenizationReason.TIMEOUT, TokenizationReason.UNAVAILABLE, TokenizationReason.CIRCUIT_OPEN}
)
_OF_BACKEND = frozenset(
    {
        TokenizationReason.NO_BACKEND,
        TokenizationReason.UNKNOWN_MODEL,
        TokenizationReason.NOT_INSTALLED,
        TokenizationReason.BROKEN_TOKENIZER,
        TokenizationReason.UNSUPPORTED,
    }
)


class TokenizationError(RequestError):
    """A prompt whose tokens cannot be told. The request can still be routed, without precise scoring."""

    def __init__(self, reason: TokenizationReason, field: str, problem: str, remedy: str) -> None:
        self.reason = reason
        super().__init__(field, problem, remedy)


class DecodeError(KvatlasError):
    """Bytes that are no event payload. ``reason`` is one of a few short words, fit for a metric's label."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class RecordingError(KvatlasError):
    """A capture file that is damaged or no capture at all."""

    def __init__(self, path: str, offset_bytes: int, problem: str, remedy: str = "make captures with `kvatlas record`") -> None:
        self.path = path
        self.offset_bytes = offset_bytes
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{path} at byte {offset_bytes}: {problem}; {remedy}")


class SnapshotError(KvatlasError):
    """A snapshot of an index that cannot be restored. The index stays as it was."""

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"snapshot: {problem}; {remedy}")


class SourceError(KvatlasError):
    """An event source cannot do its work."""

    def __init__(self, endpoint: str, problem: str, remedy: str) -> None:
        self.endpoint = endpoint
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{endpoint}: {problem}; {remedy}")


class WorkerError(KvatlasError):
    """A worker process cannot start. None of the others was left running."""

    def __init__(self, number: int, problem: str) -> None:
        self.number = number
        self.problem = problem
        super().__init__(f"worker {number} cannot start: {problem}")


class RouteError(KvatlasError):
    """A request that is sent nowhere.

    ``reason``: for the header x-llm-d-request-dropped-reason, where llm-d has one.
    """

    status: int = 500
    reason: str | None = None

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}; {remedy}")


class NoEndpointError(RouteError):
    """Nobody is there to take the request."""

    status = 503
    reason = "rejected-no-endpoints"

    def __init__(self, problem: str) -> None:
        super().__init__(problem, "see GET /v1/endpoints for who is there, and that engines are up")


class NoCachedPrefixError(RouteError):
    """``Prefer: if-available``, and no endpoint holds any of the prompt."""

    status = 412

    def __init__(self) -> None:
        super().__init__("no endpoint holds a prefix of the prompt", "send it without Prefer: if-available")


class SaturatedError(RouteError):
    """Everybody is busy, or the queue for the request is full."""

    status = 429
    reason = "rejected-saturated"

    def __init__(self, problem: str) -> None:
        super().__init__(problem, "send it again later")


class ExpiredError(RouteError):
    """The request waited in a queue for as long as it may."""

    status = 429
    reason = "rejected-ttl-expired"

    def __init__(self, problem: str) -> None:
        super().__init__(problem, "send it again later, or let it wait longer")


class StoppingError(RouteError):
    """The router stops, and takes nothing new."""

    status = 503
    reason = "rejected-shutting-down"

    def __init__(self) -> None:
        super().__init__("the router is stopping", "send it to another replica, or again later")
