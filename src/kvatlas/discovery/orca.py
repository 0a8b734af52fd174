"""Load from ORCA response headers: an engine that is asked to says with every answer how busy it is. No IO.

Source: vLLM's ORCA headers (JSON, TEXT), NVIDIA Triton's, and gRPC's BIN form; the names are the engines' own.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping

import msgspec
from google.protobuf.message import DecodeError as ProtobufError

from kvatlas.proto.kvatlas.v1 import orca_pb2
from kvatlas.route.load import EngineReport

REQUEST_HEADER = ("endpoint-load-metrics-format", "JSON")
"""Put on a request, it makes vLLM answer with the header."""

HEADER = "endpoint-load-metrics"
BINARY_HEADER = "endpoint-load-metrics-bin"
HEADER_CHARACTERS_MAX = 8192

_COUNT_MAX = 10**15
_USAGE = ("kv_cache_usage_perc", "kv_cache_utilization", "gpu_cache_usage_perc")
_WAITING = ("num_requests_waiting",)
_RUNNING = ("num_requests_running",)


class OrcaError(ValueError):
    """A header that makes no sense. The answer that it came with is not affected."""


class OrcaLoad(msgspec.Struct, frozen=True):
    """What a header says; None where it does not."""

    waiting: int | None = None
    running: int | None = None
    kv_usage: float | None = None

    def onto(self, last: EngineReport | None, at_s: float) -> EngineReport | None:
        """Return a report as of now: what the header says, and for the rest the last report. None where that is too little.

        Not for an engine with several data-parallel ranks: vLLM puts only one of them into the header, and does not say which.
        """
        if last is None:
            if self.waiting is None or self.kv_usage is None:
                return None
            last = EngineReport(at_s=at_s)
        return msgspec.structs.replace(
            last,
            at_s=at_s,
            waiting=last.waiting if self.waiting is None else self.waiting,
            running=last.running if self.running is None else self.running,
            kv_usage=last.kv_usage if self.kv_usage is None else self.kv_usage,
        )


class _Json(msgspec.Struct):
    named_metrics: dict[str, float] = {}


def read_orca(headers: Mapping[str, str]) -> OrcaLoad | None:
    """Return what an answer's headers (by lower-case name) say of load; None where they say nothing. Raises OrcaError."""
    header = headers.get(HEADER)
    if header is None:
        binary = headers.get(BINARY_HEADER)
        if binary is None:
            return None
        header = f"BIN {binary}"
    if len(header) > HEADER_CHARACTERS_MAX:
        raise OrcaError(f"longer than {HEADER_CHARACTERS_MAX} characters")
    form, _, content = header.strip().partition(" ")
    reader = _READERS.get(form.upper())
    if reader is None:
        raise OrcaError(f"{form[:20]!r} is none of {', '.join(_READERS)}")
    metrics = {name.rpartition(":")[2]: value for name, value in reader(content).items()}
    usage = _figure(metrics, _USAGE)
    load = OrcaLoad(
        waiting=None if (waiting := _figure(metrics, _WAITING)) is None else int(waiting),
        running=None if (running := _figure(metrics, _RUNNING)) is None else int(running),
        kv_usage=None if usage is None else min(1.0, usage),
    )
    return None if load == OrcaLoad() else load


def _figure(metrics: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    for name in names:
        value = metrics.get(name)
        if value is not None:
            if not (math.isfinite(value) and 0 <= value <= _COUNT_MAX):
                raise OrcaError(f"{name} is {value}")
            return value
    return None


def _json(content: str) -> Mapping[str, float]:
    try:
        return msgspec.json.decode(content, type=_Json).named_metrics
    except msgspec.MsgspecError as error:
        raise OrcaError(str(error)) from None


def _text(content: str) -> Mapping[str, float]:
    metrics = {}
    for part in content.split(","):
        name, _, value = part.strip().partition("=")
        if name.startswith("named_metrics."):
            try:
                metrics[name.removeprefix("named_metrics.")] = float(value)
            except ValueError:
                raise OrcaError(f"{part.strip()[:60]!r} is no figure") from None
    return metrics


def _binary(content: str) -> Mapping[str, float]:
    try:
        return dict(orca_pb2.OrcaLoad.FromString(base64.b64decode(content.strip(), validate=True)).named_metrics)
    except (ValueError, ProtobufError) as error:  # binascii.Error is a ValueError, and so is text beyond ASCII
        raise OrcaError(f"no base64 of a load report: {error}") from None


_READERS = {"JSON": _json, "TEXT": _text, "BIN": _binary}
