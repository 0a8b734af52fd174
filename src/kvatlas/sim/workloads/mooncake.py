"""Traces in Mooncake's format: when requests came, how long they were, and which blocks of text they shared.

Source: Qin et al., "Mooncake: Trading More Storage for Less Computation", FAST'25; kvcache-ai/Mooncake, traces: equal hash ids
say that texts are equal up to the end of that block of 512 tokens. What the blocks say is not told, and nothing of answers but
their length: here an answer is no part of any later prompt, though in life the next turn of a chat begins with it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from kvatlas.errors import RequestError
from kvatlas.sim.workloads.parameters import Tokens
from kvatlas.sim.workloads.texts import FIRST, Texts, text
from kvatlas.sim.workloads.trace_lines import TraceLines
from kvatlas.sim.workloads.workload import Arrival

EXAMPLE = '{"timestamp": 3000, "input_length": 600, "output_length": 20, "hash_ids": [0, 7]}'


class MooncakeParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which trace."""

    file: Annotated[str, Meta(min_length=1, description="the trace: JSON lines, plain or .gz")]
    block_tokens: Annotated[Tokens, Meta(description="tokens of a block, as the trace has them")] = 512


class _Record(msgspec.Struct):
    """The fields that matter here; records may have more."""

    timestamp: Annotated[float, Meta(ge=0)]
    """Milliseconds."""
    input_length: Annotated[int, Meta(ge=1, le=10_000_000)]
    output_length: Annotated[int, Meta(ge=0, le=10_000_000)]
    hash_ids: list[Annotated[int, Meta(ge=0, lt=FIRST)]]
    conversation: int | None = None


class Mooncake:
    """The trace's requests at the trace's times, the first at 0; read from the file as they are asked for."""

    def __init__(self, parameters: MooncakeParameters, seed: int, scale: float) -> None:
        self.name = Path(parameters.file).name
        self._lines = TraceLines(Path(parameters.file), _Record, EXAMPLE)
        self._block_tokens = parameters.block_tokens
        self._scale = scale
        self._texts = Texts()

    def arrivals(self) -> Iterator[Arrival]:
        first_ms = before_ms = None
        for where, record in self._lines:
            if before_ms is None or first_ms is None:
                first_ms = before_ms = record.timestamp
            if record.timestamp < before_ms:
                problem = f"timestamp: {record.timestamp:g} comes after {before_ms:g}"
                raise RequestError(where, problem, "sort the lines by their timestamps")
            before_ms = record.timestamp
            at_s = (record.timestamp - first_ms) / 1000 / self._scale
            prompt = self._prompt(where, record)
            answer = self._texts.new(max(1, record.output_length))
            yield Arrival(at_s, prompt + answer, len(prompt), session=record.conversation)

    def after(self, answered: Arrival, at_s: float) -> Arrival | None:
        return None

    def _prompt(self, where: str, record: _Record) -> array[int]:
        size = self._block_tokens
        blocks = -(-record.input_length // size)
        if len(record.hash_ids) != blocks:
            problem = f"hash_ids: has {len(record.hash_ids)}, but {record.input_length} tokens are {blocks} blocks of {size}"
            raise RequestError(where, problem, "set block_tokens to the size of the trace's blocks, or correct the line")
        prompt = array("I")
        for hash_id in record.hash_ids:
            prompt += text(hash_id, size)
        del prompt[record.input_length :]
        return prompt
