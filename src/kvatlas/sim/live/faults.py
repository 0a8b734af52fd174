"""What an embedded engine does wrong where it is told to, so that routers, clients and alerts can be tried. No IO."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from kvatlas.errors import ConfigError

Kind = Literal["status", "hang", "reset", "cut", "stall", "lose-events"]
FAULTS_MAX = 16
KINDS: tuple[Kind, ...] = get_args(Kind)


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One thing that goes wrong.

    Before an answer: ``status`` refuses the request, ``hang`` says nothing, ``reset`` cuts the connection. In its midst:
    ``cut`` cuts the connection, ``stall`` says nothing more. What hangs or stalls goes on once faults are set anew.
    ``lose-events``: a step's KV events are neither published nor kept for replay.
    """

    kind: Kind
    share: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Of requests, or of batches of events."""
    times: Annotated[int, Meta(ge=1)] | None = None
    """So often at most; None: until faults are set anew."""
    status: Annotated[int, Meta(ge=400, le=599)] = 503
    after: Annotated[int, Meta(ge=0)] = 1
    """Tokens of a stream that come before it is cut or stalls. An answer that is no stream comes by half."""

    @property
    def midway(self) -> bool:
        return self.kind in ("cut", "stall")


class FaultList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A body of ``/faults``."""

    faults: Annotated[tuple[Fault, ...], Meta(max_length=FAULTS_MAX)]


class Faults:
    """Decides what goes wrong. ``draw``: a number between 0 and 1, for each request or batch that a share is of."""

    def __init__(self, faults: Iterable[Fault] = (), draw: Callable[[], float] = random.random) -> None:
        self.listed = tuple(faults)
        """What goes wrong from now on; ``times`` are those left."""
        self.over = asyncio.Event()
        """Set once other faults are set; then it is another one."""
        self._draw = draw

    def set(self, *faults: Fault) -> None:
        """Let these go wrong, and nothing else."""
        self.listed = faults
        self.over.set()
        self.over = asyncio.Event()

    def of_request(self) -> Fault | None:
        """Return what goes wrong with one request: the first one listed that is drawn."""
        return self._drawn(lambda fault: fault.kind != "lose-events")

    def of_events(self) -> Fault | None:
        """Return what goes wrong with one batch of events."""
        return self._drawn(lambda fault: fault.kind == "lose-events")

    def _drawn(self, which: Callable[[Fault], bool]) -> Fault | None:
        for at, fault in enumerate(self.listed):
            if which(fault) and (fault.share == 1.0 or self._draw() < fault.share):
                if fault.times is not None:
                    left = (replace(fault, times=fault.times - 1),) if fault.times > 1 else ()
                    self.listed = (*self.listed[:at], *left, *self.listed[at + 1 :])
                return fault
        return None


def read_fault(text: str) -> Fault:
    """Return the fault that a command line names: ``503``, ``cut``, ``hang:0.05`` (a share). Raises ConfigError."""
    kind, colon, share = text.partition(":")
    fields: dict[str, object] = {"kind": "status", "status": kind} if kind.isdigit() else {"kind": kind}
    try:
        return msgspec.convert({**fields, **({"share": share} if colon else {})}, Fault, strict=False)
    except msgspec.ValidationError as error:
        named = f"a status from 400 to 599, or one of {', '.join(KINDS[1:])}; behind a colon a share up to 1"
        raise ConfigError("--fault", f"{text!r:.40}: {error}", named) from None
