"""What an engine's metrics page says of its load. No IO.

Several series of one metric: those of different data-parallel ranks (label ``engine`` of vLLM, ``dp_rank`` of SGLang) are
added, or told apart where ranks are endpoints; those of one rank (its tensor-parallel workers, say) are taken as the same thing
seen twice, and the largest counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from typing import TypeVar

import msgspec

from kvatlas.discovery.metric_lines import MalformedLineError, samples
from kvatlas.route.load import EngineReport
from kvatlas.types import DpRank

T = TypeVar("T")

COUNT_MAX = 10**15
DIGITS_MAX = 15
_ANY = ""
"""Where a series names no rank."""


class EngineMetricsError(Exception):
    """A page that makes no report. ``reason``: a few short words, fit for a metric's label."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}")


class Names(msgspec.Struct, frozen=True):
    """How an engine calls what is read."""

    waiting: bytes
    running: bytes
    usage: tuple[bytes, ...]
    """The first one that is there counts."""
    cache_info: bytes
    block_size_label: str
    blocks_label: str
    rank_label: str
    block_size: bytes | None = None
    """As a gauge, where the info has no labels for it."""
    blocks: bytes | None = None
    loras: bytes | None = None


VLLM = Names(
    waiting=b"vllm:num_requests_waiting",
    running=b"vllm:num_requests_running",
    usage=(b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc"),
    cache_info=b"vllm:cache_config_info",
    block_size_label="block_size",
    blocks_label="num_gpu_blocks",
    rank_label="engine",
    loras=b"vllm:lora_requests_info",
)
"""Source: vLLM 0.8 to 0.32; before 0.10 KV usage has its other name."""

SGLANG = Names(
    waiting=b"sglang:num_queue_reqs",
    running=b"sglang:num_running_reqs",
    usage=(b"sglang:token_usage",),
    cache_info=b"sglang:cache_config_info",
    block_size_label="page_size",
    blocks_label="num_pages",
    rank_label="dp_rank",
    block_size=b"sglang:page_size",
    blocks=b"sglang:num_pages",
)
"""Source: SGLang; from 0.5.11 on pages are gauges instead of labels."""

ENGINES: Mapping[str, Names] = {"vllm": VLLM, "sglang": SGLANG}


class Loras(msgspec.Struct, frozen=True):
    """Adapters that run and wait."""

    running: frozenset[str] = frozenset()
    waiting: frozenset[str] = frozenset()
    limit: int | None = None


class Figures(msgspec.Struct, frozen=True):
    """What a page says, by the rank that it says it of."""

    waiting: dict[str, float]
    running: dict[str, float]
    usage: dict[str, float]
    block_sizes: dict[str, float]
    blocks: dict[str, float]
    loras: dict[str, Loras]

    def report(self, at_s: float, rank: DpRank | None = None) -> EngineReport:
        """Return the load of all ranks together, or of one. Raises EngineMetricsError where that rank is not on the page.

        Together: requests, blocks and adapters are added, usage is the mean.
        """
        ranks = self.waiting.keys() | self.running.keys() | self.usage.keys()
        if rank is not None:
            ranks = {str(rank)}
            if not (ranks <= self.waiting.keys() and ranks <= self.running.keys() and ranks <= self.usage.keys()):
                raise EngineMetricsError("no_rank", f"rank {rank} is not among {sorted(self.waiting)[:8]}")
        usages = _of(self.usage, ranks)
        sizes = _of(self.block_sizes, ranks)
        blocks = _of(self.blocks, ranks)
        loras = _of(self.loras, ranks)
        return EngineReport(
            at_s=at_s,
            waiting=int(sum(_of(self.waiting, ranks))),
            running=int(sum(_of(self.running, ranks))),
            kv_usage=min(1.0, sum(usages) / len(usages)) if usages else 0.0,
            block_size_tokens=int(max(sizes, default=0)) or None,
            gpu_blocks=int(sum(blocks)) or None,
            loras_running=frozenset[str]().union(*(one.running for one in loras)),
            loras_waiting=frozenset[str]().union(*(one.waiting for one in loras)),
            loras_max=max((one.limit for one in loras if one.limit is not None), default=None),
        )


def read_figures(page: bytes, engine: str) -> Figures:
    """Return what a page says. Raises EngineMetricsError where a figure that counts is missing or no number."""
    names = ENGINES[engine]
    try:
        usage = next((found for name in names.usage if (found := _gauge(page, name, names))), {})
        block_sizes, blocks = _cache(page, names)
        figures = Figures(
            waiting=_gauge(page, names.waiting, names),
            running=_gauge(page, names.running, names),
            usage=usage,
            block_sizes=block_sizes,
            blocks=blocks,
            loras={} if names.loras is None else _loras(page, names.loras, names.rank_label),
        )
    except MalformedLineError as error:
        raise EngineMetricsError("malformed", str(error)) from None
    for name, figure in ((names.waiting, figures.waiting), (names.running, figures.running), (names.usage[0], figures.usage)):
        if not figure:
            raise EngineMetricsError("missing", f"no {name.decode()}: is the engine of this kind, and are its metrics on?")
    return figures


def _of(figures: dict[str, T], ranks: Set[str]) -> list[T]:
    """Return the figures of ranks; those that name no rank where there are none."""
    found = [figure for rank, figure in figures.items() if rank in ranks]
    return found or ([figures[_ANY]] if _ANY in figures else [])


def _gauge(page: bytes, name: bytes, names: Names) -> dict[str, float]:
    """Return a gauge's value by rank. Series of one priority are parts of another one (SGLang)."""
    values: dict[str, float] = {}
    for sample in samples(page, name):
        if not 0 <= sample.value <= COUNT_MAX:
            raise EngineMetricsError("out_of_range", f"{name.decode()} is {sample.value}")
        labels = sample.labels
        if not labels.get("priority"):
            rank = labels.get(names.rank_label, _ANY)
            values[rank] = max(sample.value, values.get(rank, 0.0))
    return values


def _cache(page: bytes, names: Names) -> tuple[dict[str, float], dict[str, float]]:
    """Return block sizes and block counts by rank, from the info's labels or from gauges. What is no number is left out."""
    sizes: dict[str, float] = {}
    blocks: dict[str, float] = {}
    for sample in samples(page, names.cache_info):
        labels = sample.labels
        rank = labels.get(names.rank_label, _ANY)
        for figures, label in ((sizes, names.block_size_label), (blocks, names.blocks_label)):
            if (number := _positive(labels.get(label, ""))) is not None:
                figures[rank] = float(number)
    if not sizes and names.block_size is not None:
        sizes = _gauge(page, names.block_size, names)
    if not blocks and names.blocks is not None:
        blocks = _gauge(page, names.blocks, names)
    return sizes, blocks


def _loras(page: bytes, name: bytes, rank_label: str) -> dict[str, Loras]:
    """Return adapters by rank. Every change makes a new series, whose value is its time: the latest one holds.

    Source: vLLM, ``vllm:lora_requests_info``.
    """
    latest: dict[str, Loras] = {}
    known = [sample for sample in samples(page, name) if not math.isnan(sample.value)]
    for sample in sorted(known, key=lambda sample: sample.value, reverse=True):
        labels = sample.labels
        rank = labels.get(rank_label, _ANY)
        if rank not in latest:
            latest[rank] = _loras_of(labels)
        if rank == _ANY:  # no need to take apart the hundreds that an engine has after some days
            break
    return latest


def _loras_of(labels: Mapping[str, str]) -> Loras:
    return Loras(
        frozenset(_listed(labels.get("running_lora_adapters", ""))),
        frozenset(_listed(labels.get("waiting_lora_adapters", ""))),
        _positive(labels.get("max_lora", "")),
    )


def _positive(text: str) -> int | None:
    """Return a count above 0; None for anything else, such as vLLM's "None"."""
    return int(text) or None if text.isdecimal() and len(text) <= DIGITS_MAX else None


def _listed(names: str) -> Iterator[str]:
    return (name for part in names.split(",") if (name := part.strip()))
