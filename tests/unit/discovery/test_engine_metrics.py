"""From engines' metrics pages to load, as vLLM and SGLang write them."""

from __future__ import annotations

import pytest

from kvatlas.discovery.engine_metrics import EngineMetricsError, read_figures
from kvatlas.route.load import EngineReport
from kvatlas.types import DpRank

VLLM_PAGE = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="meta-llama/Llama-3.1-8B"} 5.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="meta-llama/Llama-3.1-8B"} 12.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="meta-llama/Llama-3.1-8B",reason="capacity"} 7.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="meta-llama/Llama-3.1-8B"} 0.25
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",kv_cache_dtype_skip_layers="[]",num_cpu_blocks="None",\
num_gpu_blocks="74272",num_gpu_blocks_override="None",sliding_window="None"} 1.0
vllm:lora_requests_info{max_lora="4",running_lora_adapters="a,b",waiting_lora_adapters="c"} 1.257894569e+09
vllm:lora_requests_info{max_lora="4",running_lora_adapters="",waiting_lora_adapters=""} 1.257894567e+09
"""

VLLM_TWO_RANKS = b"""\
vllm:num_requests_running{engine="0",model_name="m"} 5
vllm:num_requests_running{engine="1",model_name="m"} 1
vllm:num_requests_waiting{engine="0",model_name="m"} 2
vllm:num_requests_waiting{engine="1",model_name="m"} 0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="900"} 1
"""

SGLANG_PAGE = b"""\
sglang:num_running_reqs{engine_type="unified",model_name="m",tp_rank="0"} 3.0
sglang:num_queue_reqs{engine_type="unified",model_name="m",priority="",tp_rank="0"} 4.0
sglang:num_queue_reqs{engine_type="unified",model_name="m",priority="5",tp_rank="0"} 4.0
sglang:token_usage{engine_type="unified",model_name="m",tp_rank="0"} 0.55
sglang:full_token_usage{engine_type="unified",model_name="m",tp_rank="0"} 0.9
"""


def report(page: bytes, engine: str = "vllm", rank: DpRank | None = None) -> EngineReport:
    return read_figures(page, engine).report(7.0, rank)


def refusal(page: bytes, engine: str = "vllm", rank: DpRank | None = None) -> str:
    with pytest.raises(EngineMetricsError) as refused:
        report(page, engine, rank)
    return refused.value.reason


def test_a_page_of_vllm() -> None:
    assert report(VLLM_PAGE) == EngineReport(
        at_s=7.0,
        waiting=12,
        running=5,
        kv_usage=0.25,
        block_size_tokens=16,
        gpu_blocks=74272,
        loras_running=frozenset({"a", "b"}),
        loras_waiting=frozenset({"c"}),
        loras_max=4,
    )


def test_the_latest_adapters_hold_and_are_told_apart_by_rank_where_they_are() -> None:
    line = b'vllm:lora_requests_info{engine="%d",max_lora="2",running_lora_adapters="%s",waiting_lora_adapters=""} %d\n'
    page = VLLM_TWO_RANKS + line % (1, b"old", 5) + line % (0, b"a", 7) + line % (1, b"b", 6) + line % (0, b"older", 4)
    assert report(page).loras_running == {"a", "b"}
    assert report(page, rank=DpRank(1)).loras_running == {"b"}


def test_an_older_vllm_has_another_name_for_usage() -> None:
    assert report(VLLM_PAGE.replace(b"vllm:kv_cache_usage", b"vllm:gpu_cache_usage")).kv_usage == 0.25


def test_ranks_are_added_and_told_apart() -> None:
    assert report(VLLM_TWO_RANKS) == EngineReport(
        at_s=7.0, waiting=2, running=6, kv_usage=0.375, block_size_tokens=16, gpu_blocks=1900
    )
    assert report(VLLM_TWO_RANKS, rank=DpRank(1)) == EngineReport(
        at_s=7.0, waiting=0, running=1, kv_usage=0.25, block_size_tokens=16, gpu_blocks=900
    )
    assert refusal(VLLM_TWO_RANKS, rank=DpRank(2)) == "no_rank"


def test_what_names_no_rank_holds_for_each() -> None:
    page = VLLM_TWO_RANKS + b'vllm:lora_requests_info{max_lora="1",running_lora_adapters="a",waiting_lora_adapters=""} 1.0\n'
    assert report(page, rank=DpRank(1)).loras_running == {"a"}
    assert report(page).loras_running == {"a"}


@pytest.mark.parametrize(
    "cache",
    [
        b'sglang:cache_config_info{model_name="m",num_pages="11147",page_size="64"} 1.0\n',
        b'sglang:page_size{model_name="m",tp_rank="0"} 64.0\nsglang:num_pages{model_name="m",tp_rank="0"} 11147.0\n',
    ],
    ids=["labels", "gauges"],
)
def test_a_page_of_sglang(cache: bytes) -> None:
    assert report(SGLANG_PAGE + cache, "sglang") == EngineReport(
        at_s=7.0, waiting=4, running=3, kv_usage=0.55, block_size_tokens=64, gpu_blocks=11147
    )


def test_workers_of_one_rank_are_the_same_rank_seen_twice() -> None:
    page = b"".join(
        b'sglang:num_running_reqs{dp_rank="%d",tp_rank="%d"} 3\nsglang:num_queue_reqs{dp_rank="%d",tp_rank="%d"} 1\n'
        b'sglang:token_usage{dp_rank="%d",tp_rank="%d"} 0.5\n' % (dp, tp, dp, tp, dp, tp)
        for dp in range(2)
        for tp in range(4)
    )
    assert report(page, "sglang") == EngineReport(at_s=7.0, waiting=2, running=6, kv_usage=0.5)
    assert report(page, "sglang", DpRank(1)) == EngineReport(at_s=7.0, waiting=1, running=3, kv_usage=0.5)


def test_usage_is_at_most_all() -> None:
    assert report(VLLM_PAGE.replace(b"0.25", b"1.002")).kv_usage == 1.0


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (b"", "missing"),
        (b"<html>not found</html>", "missing"),
        (SGLANG_PAGE, "missing"),
        (VLLM_PAGE.replace(b"vllm:num_requests_waiting{", b"vllm:other{"), "missing"),
        (VLLM_PAGE.replace(b" 12.0", b" NaN"), "out_of_range"),
        (VLLM_PAGE.replace(b" 12.0", b" -1"), "out_of_range"),
        (VLLM_PAGE.replace(b" 12.0", b" +Inf"), "out_of_range"),
        (VLLM_PAGE.replace(b" 12.0", b" twelve"), "malformed"),
        (VLLM_PAGE.replace(b'engine="0",model', b'engine="0,model'), "malformed"),
    ],
)
def test_what_makes_no_report(page: bytes, reason: str) -> None:
    assert refusal(page) == reason


def test_figures_of_the_cache_that_are_no_numbers_are_left_out() -> None:
    page = VLLM_PAGE.replace(b'num_gpu_blocks="74272"', b'num_gpu_blocks="None"').replace(b'"16"', b'"%s"' % (b"9" * 5000))
    assert (report(page).gpu_blocks, report(page).block_size_tokens) == (None, None)
