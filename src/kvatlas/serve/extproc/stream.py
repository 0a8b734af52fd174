"""One HTTP request as Envoy tells it over one gRPC stream: messages in, answers out. No IO, no waiting, no clock of its own.

    exchange = Exchange(limits, room, clock)
    for message in stream:
        said = exchange.receive(message)        # answers to send, or an Ask
        if isinstance(said, Ask):
            said = exchange.decided(trip)       # or exchange.refused(error)
    exchange.close()                            # however it ended

The request is held until it is complete, because the decision depends on its body; the answer is let pass as it comes. A trip
given to ``decided`` is finished once, by its answer's last piece or by ``close``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence

import msgspec

from kvatlas.errors import RequestError, SaturatedError
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2 import HttpBody, ProcessingRequest, ProcessingResponse
from kvatlas.serve.extproc.answer import WatchedAnswer
from kvatlas.serve.extproc.held import HeldBody, Room
from kvatlas.serve.extproc.messages import (
    body_chunks,
    header_bytes,
    immediate,
    read_headers,
    send_to,
    subset_hint,
    unchanged,
)
from kvatlas.serve.extproc.modes import Answers, Bodies, ProtocolError, answer_bodies, request_bodies
from kvatlas.serve.routing.dispatch import Trip
from kvatlas.serve.routing.refusals import Refusal, refusal, refused

Replies = Sequence[ProcessingResponse]

NO_ROOM = SaturatedError("too many bodies are held already")
NO_BODY = RequestError("body", "is empty", "send one JSON object")


class Ask(msgspec.Struct, frozen=True):
    """What has to be decided before the exchange goes on."""

    path: str
    """Without its query."""
    headers: Mapping[str, str]
    body: bytes | None
    """None: there is none, or Envoy does not show it."""
    subset: frozenset[str] | None


class Limits(msgspec.Struct, frozen=True):
    """What one request may cost."""

    body_bytes_max: int
    headers_bytes_max: int


class _State(enum.Enum):
    HEADERS = enum.auto()
    """Nothing came yet."""
    BODY = enum.auto()
    """The request comes."""
    ASKED = enum.auto()
    """It waits for its decision."""
    SENT = enum.auto()
    """It is on its way to an engine, or has an answer."""
    OVER = enum.auto()
    """Nothing more is to be said."""


class Exchange:
    """One request and its answer."""

    def __init__(self, limits: Limits, room: Room, clock: Callable[[], float]) -> None:
        """``clock``: seconds that only rise."""
        self._limits = limits
        self._clock = clock
        self._state = _State.HEADERS
        self._headers: dict[str, str] = {}
        self._subset: frozenset[str] | None = None
        self._held = HeldBody(room)
        self._bodies = Bodies.DUPLEX
        self._answers = Answers.DUPLEX
        self._answer: WatchedAnswer | None = None
        self._trailers = False
        self._bodiless = False
        self.refusal: Refusal | None = None
        """What the client was told, where it was refused."""

    @property
    def over(self) -> bool:
        """Whether nothing more is to be said: the stream can be ended."""
        return self._state is _State.OVER

    def receive(self, message: ProcessingRequest) -> Replies | Ask:
        """Take Envoy's next message. Raises ProtocolError for one that makes no sense here: the stream has to fail."""
        kind = message.WhichOneof("request")
        if self._state is _State.OVER:
            return ()
        if self._state is _State.ASKED:
            raise ProtocolError(f"{kind} came before the request was answered")
        if kind == "request_headers":
            return self._request_headers(message)
        if kind is None or self._state is _State.HEADERS:
            raise ProtocolError(f"the first message was {kind}; configure request_header_mode: SEND")
        if kind == "request_body":
            return self._request_body(message.request_body)
        if kind == "request_trailers":
            return self._request_trailers()
        return self._response(kind, message)

    def decided(self, trip: Trip) -> Replies:
        """Send the request where it goes. The trip is finished from here on, whatever happens."""
        self._state = _State.SENT
        self._answer = WatchedAnswer(trip, self._clock)
        body = trip.asked.body
        changed = body != self._held.whole()
        bodies = Bodies.UNSEEN if self._bodiless else self._bodies
        head = ProcessingResponse()
        common = (head.request_body if bodies is Bodies.BUFFERED else head.request_headers).response
        common.clear_route_cache = True
        length = len(body) if body and (changed or bodies is Bodies.DUPLEX) else None
        send_to(head, common.header_mutation, trip.request_headers(), self._headers, length)
        replies = [head]
        if bodies is Bodies.DUPLEX:
            replies += body_chunks(body, ends=not self._trailers)
        elif bodies is Bodies.BUFFERED and changed:
            common.body_mutation.body = body
        elif bodies is Bodies.COUNTED:
            replies += self._counted(body if changed else None)
        if self._trailers:
            replies.append(unchanged("request_trailers"))
        self._held.drop()
        trip.body_sent()
        return replies

    def refused(self, error: Exception) -> Replies:
        """Tell the client why its request goes nowhere. RequestError and RouteError say it themselves."""
        return self._refuse(refusal(error))

    def close(self) -> None:
        """The stream ended, in whatever way: give back what is held, and finish the trip. May be called again."""
        self._held.drop()
        if self._answer is not None:
            self._answer.cut_off(seen=self._answers is not Answers.UNSEEN)
        self._state = _State.OVER

    # ── the request ──

    def _request_headers(self, message: ProcessingRequest) -> Replies | Ask:
        if self._state is not _State.HEADERS:
            raise ProtocolError("request_headers came twice")
        if message.observability_mode:
            raise ProtocolError("nobody looks at answers; configure observability_mode: false")
        self._bodies = request_bodies(message)
        self._answers = answer_bodies(message)
        self._state = _State.BODY
        told = message.request_headers
        if header_bytes(told.headers) > self._limits.headers_bytes_max:
            return self._refuse(headers_too_long(self._limits))
        self._headers = read_headers(told.headers)
        try:
            self._subset = subset_hint(message.metadata_context)
        except RequestError as error:
            return self.refused(error)
        if told.end_of_stream or self._bodies is Bodies.UNSEEN:
            return self._ask(None)
        if _length(self._headers) > self._limits.body_bytes_max:
            return self._refuse(too_long(self._limits))
        return (unchanged("request_headers"),) if self._bodies is Bodies.BUFFERED else ()

    def _request_body(self, body: HttpBody) -> Replies | Ask:
        if self._state is _State.SENT:
            if self._answer is None:  # Envoy answered meanwhile
                return ()
            if self._bodies is not Bodies.UNSEEN:
                raise ProtocolError("request_body came after the end of the body")
            return (unchanged("request_body"),)
        if self._held.size_bytes + len(body.body) > self._limits.body_bytes_max:
            return self._refuse(too_long(self._limits))
        if not self._held.add(body.body):
            return self.refused(NO_ROOM)
        if body.end_of_stream or self._bodies is Bodies.BUFFERED:
            return self._ask(self._held.whole())
        return ()

    def _request_trailers(self) -> Replies | Ask:
        if self._state is _State.SENT:
            return (unchanged("request_trailers"),)
        if self._bodies is Bodies.BUFFERED:  # the answer to trailers could not say where the request goes
            return self.refused(NO_BODY)
        self._trailers = True
        return self._ask(self._held.whole())

    def _ask(self, body: bytes | None) -> Ask:
        self._state = _State.ASKED
        self._bodiless = body is None
        return Ask(self._headers.get(":path", "").partition("?")[0], self._headers, body, self._subset)

    def _counted(self, changed: bytes | None) -> list[ProcessingResponse]:
        """Return one answer for each piece of the body; a changed body goes in place of the first."""
        replies = [unchanged("request_body") for _ in range(self._held.messages)]
        if changed is not None:
            for reply in replies:
                reply.request_body.response.body_mutation.clear_body = True
            replies[0].request_body.response.body_mutation.body = changed
        return replies

    def _refuse(self, told: Refusal) -> Replies:
        self._held.drop()
        self._state = _State.OVER
        self.refusal = told
        return (immediate(told),)

    # ── the answer ──

    def _response(self, kind: str, message: ProcessingRequest) -> Replies:
        if self._state is _State.BODY:  # an answer of Envoy's own: the client was too slow, say. Nothing is left to decide
            self._held.drop()
            self._state = _State.SENT
        if self._answer is None:
            return (unchanged(kind),)
        if kind == "response_headers":
            reply = self._answer.headers(message)
        elif kind == "response_body":
            reply = self._answer.body(message.response_body, send_back=self._answers is Answers.DUPLEX)
        else:
            reply = self._answer.trailers()
        if self._answer.complete:
            self._state = _State.OVER
        return (reply,)


def headers_too_long(limits: Limits) -> Refusal:
    return refused(431, f"headers: are longer than {limits.headers_bytes_max} bytes; send fewer")


def too_long(limits: Limits) -> Refusal:
    """Return what is told of a body."""
    return refused(413, f"body: is longer than {limits.body_bytes_max} bytes; send less in one request")


def _length(headers: Mapping[str, str]) -> int:
    given = headers.get("content-length", "")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 20 else 0
