"""The endpoint picker's gRPC in Rust (``native/extproc``): streams are threads' of the native core, decisions are ours.

They tell what happens through a mailbox, so that one wake-up of the event loop serves all requests that wait for it. A request
is told once, when it is whole, and decided once; its answer passes without waking anybody but for what is learnt from it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from kvatlas import _native
from kvatlas.config.extproc import ExtProcSettings
from kvatlas.errors import SaturatedError
from kvatlas.mail import Mail
from kvatlas.observe.logs import get_logger
from kvatlas.route.outcome import Outcome
from kvatlas.serve.extproc.answer import how_it_ended
from kvatlas.serve.extproc.decide import decide
from kvatlas.serve.extproc.messages import hint_error
from kvatlas.serve.extproc.metrics import ExtProcMetrics
from kvatlas.serve.extproc.stream import NO_BODY, NO_ROOM, Ask, Limits, headers_too_long, too_long
from kvatlas.serve.listening import resolve, taken
from kvatlas.serve.routing.answers import said_done_in, usage_in
from kvatlas.serve.routing.asked import CONSUMED
from kvatlas.serve.routing.dispatch import Dispatcher, Trip
from kvatlas.serve.routing.load_headers import TELLING
from kvatlas.serve.routing.refusals import Refusal, refusal

Pairs = list[tuple[str, str]]

_log = get_logger(__name__)


class NativeStack:
    """A Stack."""

    def __init__(self, settings: ExtProcSettings, dispatcher: Dispatcher, metrics: ExtProcMetrics) -> None:
        self._settings = settings
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._picker: _native.Picker | None = None
        self._mail: Mail | None = None
        self._requests: dict[int, Request] = {}
        self._idle = asyncio.Event()

    def bind(self) -> int:
        settings = self._settings
        _, address = resolve("extProc", settings.host, settings.port)
        mail = self._mail = Mail(_native.Mailbox())
        try:
            picker = self._picker = _native.Picker(
                str(address[0]),
                settings.port,
                settings.threads,
                settings.streams_max,
                settings.body_bytes_max,
                settings.headers_bytes_max,
                settings.held_bytes_max,
                sorted(CONSUMED),
                sorted(TELLING),
                _refusals(settings),
                mail.mailbox,
                mail.ticket(self._read),
            )
        except OSError as error:
            mail.close()
            raise taken("extProc", settings.host, settings.port, error) from None
        self._metrics.observe(picker.streams, picker.held_bytes)
        return picker.port()

    async def start(self) -> None:
        if self._picker is not None:
            self._picker.serve()

    async def set_ready(self, ready: bool) -> None:
        if self._picker is not None:
            self._picker.set_ready(ready)

    async def stop(self, grace_s: float) -> None:
        if self._picker is None or self._mail is None:
            return
        self._picker.stop_accepting()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        await asyncio.to_thread(self._picker.close)
        self._mail.read()
        self._mail.close()
        left = list(self._requests.values())  # of streams whose end was not told in time
        self._requests.clear()
        for request in left:
            request.cut_off()
        await asyncio.gather(*(request.task for request in left), return_exceptions=True)

    def _read(self, letter: Any) -> None:
        number, kind, *told = letter
        if kind == "asked":
            stream, *asked = told
            self._requests[number] = Request(stream, Ask(*asked), self._dispatcher)
        elif kind == "ended":
            how, problem, answer = told
            if problem is not None:
                _log.warning("ext_proc stream refused", problem=problem)
            self._metrics.ended(how)
            if (request := self._requests.pop(number, None)) is not None:
                request.ended(answer)
        elif kind == "idle":
            self._idle.set()
        elif (request := self._requests.get(number)) is not None and (trip := request.trip) is not None:
            if kind == "first_token":
                request.ttft_s = told[0]
                trip.first_token(told[0])
            else:
                answered(trip, *told)


class Request:
    """A stream from its request's being whole to its end."""

    def __init__(self, stream: _native.Stream, ask: Ask, dispatcher: Dispatcher) -> None:
        """Begins to decide."""
        self.trip: Trip | None = None
        self.ttft_s: float | None = None
        self.task = asyncio.get_running_loop().create_task(self._decide(stream, ask, dispatcher))

    async def _decide(self, stream: _native.Stream, ask: Ask, dispatcher: Dispatcher) -> None:
        decided = await decide(dispatcher, ask)
        if isinstance(decided, Trip):
            self.trip = decided
            send(stream, decided, ask.body)
            decided.body_sent()
        else:
            stream.refuse(*_told(refusal(decided)))

    def ended(self, answer: tuple[bool, int | None, bool, bool, bytes, float] | None) -> None:
        """Finish the trip, or give the request's place up where it waits. ``answer``: as letters have it."""
        if self.trip is None or answer is None:
            self.cut_off()
            return
        whole, status, shown, events, tail, took_s = answer
        usage = usage_in(tail)
        self.trip.finished(
            Outcome(
                end=how_it_ended(status, whole=whole or not shown or (events and said_done_in(tail))),
                ttft_s=self.ttft_s,
                duration_s=took_s,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                output_tokens=usage.output_tokens,
            )
        )

    def cut_off(self) -> None:
        """End it without an answer of which anything is known."""
        self.task.cancel()
        if self.trip is not None:
            self.trip.finished(Outcome(end=how_it_ended(None, whole=False)))


def send(stream: _native.Stream, trip: Trip, body: bytes | None) -> None:
    """Say where a request goes, and what its answer is to look like."""
    sent = trip.asked.body
    changed = None if body is None or sent is body else sent
    replies = [(target.authority, _pairs(trip.response_headers(target))) for target in trip.decision.targets]
    stream.send(_pairs(trip.request_headers()), changed, replies, list(trip.hidden_headers()))


def answered(trip: Trip, headers: Mapping[str, str], served: str | None) -> None:
    """Take an answer's headers, and who answers where that is not the target."""
    for target in trip.decision.targets:
        if target.authority == served:
            trip.moved(target)
    trip.answered(headers)


def _pairs(headers: Mapping[str, str]) -> Pairs:
    return list(headers.items())


def _told(one: Refusal) -> tuple[int, Pairs, bytes]:
    return one.status, list(one.headers), one.body


def _refusals(settings: ExtProcSettings) -> Any:
    """Return what clients are told without a decision, in the order that the core wants."""
    limits = Limits(settings.body_bytes_max, settings.headers_bytes_max)
    streams = refusal(SaturatedError(f"{settings.streams_max} requests are in progress"))
    held, empty, subset = (refusal(error) for error in (NO_ROOM, NO_BODY, hint_error()))
    return tuple(_told(one) for one in (streams, headers_too_long(limits), too_long(limits), held, empty, subset))
