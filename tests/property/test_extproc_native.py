"""Whatever Envoy says in whatever order, the native stack says and learns what ``stream.py`` would."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack

import grpc
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.index.choice import why_no_native
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2_grpc import ExternalProcessorStub
from kvatlas.route.outcome import End
from kvatlas.serve.extproc.decide import decide
from kvatlas.serve.extproc.held import Room
from kvatlas.serve.extproc.modes import ProtocolError
from kvatlas.serve.extproc.stream import Ask, Exchange, Limits
from kvatlas.serve.routing.dispatch import Trip
from tests.models.picker import Picker
from tests.property.test_extproc_streams import messages

ENGINES = ("10.0.0.1:8000", "10.0.0.2:8000")
SERVED = "x-gateway-destination-endpoint-served"
BOUNDS = {"body_bytes_max": 200_000, "headers_bytes_max": 2_000}


class Seen(msgspec.Struct):
    """What one stream led to."""

    said: list[ProcessingResponse] = []
    problem: str = ""
    """Why it failed."""
    outcomes: list[tuple[str, End, bool, int | None]] = []
    """Of whom, how it ended, whether a first token was seen, tokens of the prompt."""


def outcomes(picker: Picker) -> list[tuple[str, End, bool, int | None]]:
    return [(name, one.end, one.ttft_s is not None, one.prompt_tokens) for name, one in picker.outcomes.seen]


async def specified(picker: Picker, room: Room, told: Sequence[ProcessingRequest]) -> tuple[Seen, int]:
    """Return what has to be seen, and how many messages were taken until the stream was over."""
    picker.outcomes.seen.clear()
    seen, taken = Seen(), 0
    exchange = Exchange(Limits(**BOUNDS), room, lambda: 1.0)
    try:
        while taken < len(told) and not exchange.over:
            taken += 1
            said = exchange.receive(told[taken - 1])
            if isinstance(said, Ask):
                decided = await decide(picker.dispatcher, said)
                said = exchange.decided(decided) if isinstance(decided, Trip) else exchange.refused(decided)
            seen.said += said
    except ProtocolError as error:
        seen.problem = str(error)
    exchange.close()
    seen.outcomes = outcomes(picker)
    return seen, taken


async def seen_at(picker: Picker, channel: grpc.aio.Channel, told: Sequence[ProcessingRequest]) -> Seen:
    picker.outcomes.seen.clear()
    seen = Seen()
    call = ExternalProcessorStub(channel).Process()
    for message in told:
        await call.write(message)
    await call.done_writing()
    try:
        while isinstance(reply := await call.read(), ProcessingResponse):
            seen.said.append(reply)
    except grpc.aio.AioRpcError as error:
        seen.problem = error.details() or ""
    await picker.outcomes.count(sum(reply.HasField("dynamic_metadata") for reply in seen.said))
    seen.outcomes = outcomes(picker)
    return seen


class Both:
    """A native picker, and one that is only asked, in one event loop."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._runner.run(self._start())

    async def _start(self) -> None:
        self.specified = Picker(ENGINES)
        self.native = Picker(ENGINES, stack="native", **BOUNDS)
        for picker in (self.specified, self.native):
            picker.turns.targets = 2
        self.room = Room(1 << 30)
        await self.native.start()
        self._stack.push_async_callback(self.native.stop)
        address = f"127.0.0.1:{self.native.port}"
        self._channel = await self._stack.enter_async_context(grpc.aio.insecure_channel(address))

    def tell(self, told: Sequence[ProcessingRequest]) -> tuple[Seen, Seen]:
        return self._runner.run(self._tell(told))

    async def _tell(self, told: Sequence[ProcessingRequest]) -> tuple[Seen, Seen]:
        wanted, taken = await specified(self.specified, self.room, told)
        return wanted, await seen_at(self.native, self._channel, told[:taken])

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    if why_no_native() is not None:
        pytest.skip("the native core is not installed")
    with contextlib.closing(Both()) as one:
        yield one


def changed(messages: Sequence[ProcessingRequest], padding: int, served: str | None) -> Iterator[ProcessingRequest]:
    """Yield messages whose request has an id, so that none is made up, and headers that are not passed on."""
    for message in messages:
        more = ProcessingRequest()
        if message.HasField("request_headers"):
            headers = more.request_headers.headers.headers
            headers.add(key="X-Request-Id", raw_value=b"one")
            headers.add(key="x-prefiller-host-port", value="a client's own")
        if message.HasField("response_headers") and served is not None:
            more.response_headers.headers.headers.add(key=SERVED, raw_value=served.encode())
        if message.request_body.body.startswith(b"{"):
            more.request_body.body = b'{"model": "m", "prompt": "' + b"x" * padding + b'"}'
        whole = ProcessingRequest()
        whole.CopyFrom(message)
        whole.MergeFrom(more)
        yield whole


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.none(), st.booleans()),
    st.lists(messages(), max_size=7),
    st.sampled_from([None, *ENGINES, "10.9.9.9:1"]),
    st.sampled_from([0, 70_000, 300_000]),
)
def test_it_says_and_learns_what_is_specified(
    both: Both, ends: bool | None, told: list[ProcessingRequest], served: str | None, padding: int
) -> None:
    if ends is not None:  # else it seldom begins as it should
        first = ProcessingRequest()
        first.request_headers.end_of_stream = ends
        told = [first, *told]
    wanted, seen = both.tell(list(changed(told, padding, served)))
    assert seen == wanted
    assert both.native.in_flight == 0
    assert both.native.metric("kvatlas_extproc_held_bytes") == 0
