"""Every error that kvatlas raises.

KvatlasError
├── ConfigError          a setting is unknown or wrong: path, allowed values
├── TokensError          token input that cannot be keyed: position, value
├── RequestError         a query that cannot be answered as asked: field, remedy
├── DecodeError          bytes that are no event payload: reason (a metric's label)
├── RecordingError       a capture file that is no capture: path, offset
├── SnapshotError        a snapshot that cannot be restored: problem, remedy
└── SourceError          an event source cannot do its work: endpoint, remedy
"""

from __future__ import annotations


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
