"""How a gRPC call runs: bounded, in a thread, with its errors as status codes and its time in the metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc
from grpc.aio import ServicerContext

from kvatlas.config import ApiSettings
from kvatlas.errors import KvatlasError, RequestError, TokenizationError, TokenizationReason, TokensError
from kvatlas.observe.logs import get_logger
from kvatlas.observe.metrics import Metrics
from kvatlas.serve.gate import Gate, OverloadedError, Slot

Q = TypeVar("Q")
A = TypeVar("A")

_log = get_logger(__name__)

_CODE_BY_ERROR: tuple[tuple[type[BaseException], grpc.StatusCode], ...] = (
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (TokensError, grpc.StatusCode.INVALID_ARGUMENT),
    (OverloadedError, grpc.StatusCode.UNAVAILABLE),
    (TimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
)

_CODE_BY_REASON = {
    TokenizationReason.NO_BACKEND: grpc.StatusCode.UNIMPLEMENTED,
    TokenizationReason.NOT_INSTALLED: grpc.StatusCode.UNIMPLEMENTED,
    TokenizationReason.UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    TokenizationReason.UNKNOWN_MODEL: grpc.StatusCode.NOT_FOUND,
    TokenizationReason.BROKEN_TOKENIZER: grpc.StatusCode.FAILED_PRECONDITION,
    TokenizationReason.TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    TokenizationReason.BUSY: grpc.StatusCode.UNAVAILABLE,
    TokenizationReason.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    TokenizationReason.CIRCUIT_OPEN: grpc.StatusCode.UNAVAILABLE,
}
"""The others are the caller's fault: INVALID_ARGUMENT."""


class Calls:
    """Runs calls for the services."""

    def __init__(self, api: ApiSettings, metrics: Metrics, gate: Gate) -> None:
        self._timeout_s = api.request_timeout
        self._metrics = metrics
        self._gate = gate

    async def answer(self, name: str, context: ServicerContext[Q, A], work: Callable[[], A]) -> A:
        """Run ``work`` in a thread within the gate and return its result; abort the call where it fails."""
        return await self.steps(name, context, lambda slot: slot.run(work))

    async def steps(self, name: str, context: ServicerContext[Q, A], work: Callable[[Slot], Awaitable[A]]) -> A:
        """Let ``work`` use a slot of the gate as often as it likes, and return its result; abort the call where it fails."""
        with self.measured(name) as outcome:
            try:
                with self._gate.admit() as slot:
                    async with asyncio.timeout(self._timeout_s):
                        return await work(slot)
            except (KvatlasError, TimeoutError) as error:
                code, text = status_of(error, self._timeout_s)
                outcome.code = code
                await context.abort(code, text)
                raise AssertionError("abort returned") from error
            except Exception as error:
                _log.exception("call failed", method=name)
                outcome.code = grpc.StatusCode.INTERNAL
                await context.abort(grpc.StatusCode.INTERNAL, "service: failed inside; see the service's log")
                raise AssertionError("abort returned") from error

    @contextmanager
    def measured(self, name: str) -> Iterator[Outcome]:
        """Note a call's time, and its status code: that of ``outcome``, or CANCELLED where the client gave up."""
        outcome = Outcome()
        began = time.perf_counter()
        try:
            yield outcome
        except asyncio.CancelledError:
            outcome.code = grpc.StatusCode.CANCELLED
            raise
        finally:
            self._metrics.grpc(name, outcome.code.name, time.perf_counter() - began)


class Outcome:
    """The status code of a call, as known so far."""

    def __init__(self) -> None:
        self.code = grpc.StatusCode.OK


def status_of(error: BaseException, timeout_s: float) -> tuple[grpc.StatusCode, str]:
    """Return an error as status code and message."""
    if isinstance(error, TimeoutError):
        return (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"service: no answer within api.requestTimeout ({timeout_s:g} s); ask for less",
        )
    if isinstance(error, TokenizationError):
        return _CODE_BY_REASON.get(error.reason, grpc.StatusCode.INVALID_ARGUMENT), str(error)
    for kind, code in _CODE_BY_ERROR:
        if isinstance(error, kind):
            return code, str(error)
    _log.error("call failed", error=str(error))
    return grpc.StatusCode.INTERNAL, "service: failed inside; see the service's log"
