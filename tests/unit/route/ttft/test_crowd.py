"""How many answers a new one is expected to be beside: by KV usage where engines tell it."""

from __future__ import annotations

import pytest

from kvatlas.route.cycle import Candidate
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.load import EngineReport, InFlight, Load
from kvatlas.route.ttft.crowd import crowds
from kvatlas.types import PodId


def candidate(answers: int, kv_usage: float | None, *, prefill_tokens: int = 0, gpu_blocks: int | None = None) -> Candidate:
    prefills = 1 if prefill_tokens else 0
    in_flight = InFlight(answers + prefills, 0, prefills, prefill_tokens)
    report = None
    if kv_usage is not None:
        report = EngineReport(at_s=0.0, running=answers, kv_usage=kv_usage, gpu_blocks=gpu_blocks, block_size_tokens=16)
    name = EndpointName("e")
    return Candidate(Endpoint(name=name, address="10.0.0.1", port=8000, pod=PodId(name)), Load(report, in_flight))


def test_answers_are_shared_out_by_kv_usage() -> None:
    assert crowds([candidate(30, 0.2), candidate(10, 0.6)]) == pytest.approx([10.0, 30.0])


def test_an_idle_engine_has_no_crowd() -> None:
    assert crowds([candidate(0, 0.0), candidate(8, 0.4)]) == pytest.approx([0.0, 8.0])


@pytest.mark.parametrize("unknown", [None, 0.0])
def test_where_one_engine_does_not_tell_its_usage_answers_in_progress_count(unknown: float | None) -> None:
    assert crowds([candidate(3, unknown), candidate(8, 0.4)]) == [3.0, 8.0]


def test_prompts_on_their_way_count_as_if_their_blocks_were_in_use() -> None:
    on_its_way, there = candidate(8, 0.3, prefill_tokens=1_600, gpu_blocks=1_000), candidate(8, 0.4, gpu_blocks=1_000)
    assert crowds([on_its_way, there]) == pytest.approx([8.0, 8.0])


def test_nobody_is_beside_anybody_where_nothing_is_answered() -> None:
    assert crowds([candidate(0, 0.0), candidate(0, 0.0)]) == [0.0, 0.0]
    assert crowds([]) == []
