"""The engine's answer while it passes: when its first token came, what its usage says, and how it ended."""

from __future__ import annotations

from collections.abc import Callable

from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2 import HttpBody, ProcessingRequest, ProcessingResponse
from kvatlas.route.outcome import End, Outcome
from kvatlas.serve.extproc.messages import (
    WENT_INTO_RESPONSE,
    answer_chunk,
    read_headers,
    served_by,
    set_headers,
    unchanged,
)
from kvatlas.serve.extproc.modes import ProtocolError
from kvatlas.serve.routing.answers import AnswerReader, Usage
from kvatlas.serve.routing.dispatch import Trip


class WatchedAnswer:
    """Takes the messages of a response, and finishes the trip that it belongs to once."""

    def __init__(self, trip: Trip, clock: Callable[[], float]) -> None:
        self._trip = trip
        self._clock = clock
        self._began_s = clock()
        self._status: int | None = None
        self._reader: AnswerReader | None = None
        """None: the answer cannot be read, or nothing is to be learnt from it."""
        self._ttft_s: float | None = None
        self.complete = False

    def headers(self, message: ProcessingRequest) -> ProcessingResponse:
        """Take the status and headers."""
        if self._status is not None:
            raise ProtocolError("response_headers came twice")
        told = message.response_headers
        headers = read_headers(told.headers)
        status = headers.get(":status", "")
        self._status = int(status) if status.isascii() and status.isdigit() else 500
        served = served_by(headers, message.metadata_context)
        decision = self._trip.decision
        if served is not None and served != decision.target.authority:
            for target in decision.targets:
                if target.authority == served:
                    self._trip.moved(target)
        self._trip.answered(headers)
        if self._status < 300 and "content-encoding" not in headers:
            self._reader = AnswerReader(stream=headers.get("content-type", "").startswith("text/event-stream"))
        if told.end_of_stream:
            self._finish(how_it_ended(self._status))
        reply = ProcessingResponse()
        mutation = reply.response_headers.response.header_mutation
        set_headers(mutation, {**self._trip.response_headers(), WENT_INTO_RESPONSE: "true"})
        mutation.remove_headers.extend(name for name in self._trip.hidden_headers() if name in headers)
        return reply

    def body(self, body: HttpBody, *, send_back: bool) -> ProcessingResponse:
        """Take a piece of the body. ``send_back``: whether Envoy waits for it."""
        if self._reader is not None and self._reader.feed(body.body):
            self._ttft_s = self._clock() - self._began_s
            self._trip.first_token(self._ttft_s)
        if body.end_of_stream:
            self._finish(how_it_ended(self._status))
        return answer_chunk(body.body, ends=body.end_of_stream) if send_back else unchanged("response_body")

    def trailers(self) -> ProcessingResponse:
        """Take the end of an answer that has trailers."""
        self._finish(how_it_ended(self._status))
        return unchanged("response_trailers")

    def cut_off(self, *, seen: bool) -> None:
        """Envoy tells no more. ``seen``: whether it would have told the answer's end; if so, the client went away before.

        An engine that breaks off in the middle of its answer looks the same from here; one that fails before has an answer of
        Envoy's own, with status 503.
        """
        told = self._reader is not None and self._reader.said_done
        self._finish(how_it_ended(self._status, whole=told or not seen))

    def _finish(self, end: End) -> None:
        if self.complete:
            return
        self.complete = True
        usage = self._reader.usage() if self._reader is not None else Usage()
        self._trip.finished(
            Outcome(
                end=end,
                ttft_s=self._ttft_s,
                duration_s=self._clock() - self._began_s,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                output_tokens=usage.output_tokens,
            )
        )


def how_it_ended(status: int | None, *, whole: bool = True) -> End:
    """Return how a request ended. ``whole``: its end was seen, or cannot be."""
    if status is None or status < 400:
        return End.DONE if whole else End.CLIENT_GONE
    return End.ENGINE_ERROR if status >= 500 else End.REFUSED
