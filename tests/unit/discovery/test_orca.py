"""Load from response headers, in the three forms."""

from __future__ import annotations

import base64
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.discovery.orca import OrcaError, OrcaLoad, read_orca
from kvatlas.proto.kvatlas.v1 import orca_pb2
from kvatlas.route.load import EngineReport


def binary(**metrics: float) -> str:
    return base64.b64encode(orca_pb2.OrcaLoad(named_metrics=metrics).SerializeToString()).decode()


@pytest.mark.parametrize(
    "headers",
    [
        {"endpoint-load-metrics": 'JSON {"named_metrics": {"kv_cache_usage_perc": 0.4, "num_requests_waiting": 3.0}}'},
        {"endpoint-load-metrics": "TEXT named_metrics.kv_cache_usage_perc=0.4, named_metrics.num_requests_waiting=3.0"},
        {"endpoint-load-metrics": f"BIN {binary(kv_cache_usage_perc=0.4, num_requests_waiting=3.0)}"},
        {"endpoint-load-metrics-bin": binary(kv_cache_usage_perc=0.4, num_requests_waiting=3.0)},
        {"endpoint-load-metrics": 'json {"rps_fractional": 10.0, "named_metrics": {"vllm:kv_cache_usage_perc": 0.4, '
         '"vllm:num_requests_waiting": 3}}'},
    ],
    ids=["json", "text", "bin", "binary header", "prefixed names"],
)  # fmt: skip
def test_the_forms_say_the_same(headers: dict[str, str]) -> None:
    assert read_orca(headers) == OrcaLoad(waiting=3, kv_usage=0.4)


def test_triton_calls_usage_by_another_name() -> None:
    header = "TEXT cpu_utilization=0.3, mem_utilization=0.8, rps_fractional=10.0, eps=1, named_metrics.kv_cache_utilization=0.4"
    assert read_orca({"endpoint-load-metrics": header}) == OrcaLoad(kv_usage=0.4)


def test_a_report_of_grpc_says_nothing_of_an_engine() -> None:
    """Source: the example of Envoy's and gRPC's documentation; its figures have other names."""
    header = "BIN CZqZmZmZmbk/MQAAAAAAAABAQg4KA2ZvbxGamZmZmZm5P0IOCgNiYXIRmpmZmZmZyT8="
    assert read_orca({"endpoint-load-metrics": header}) is None
    assert read_orca({"content-type": "application/json"}) is None
    assert read_orca({"endpoint-load-metrics": "JSON {}"}) is None


@pytest.mark.parametrize(
    "header",
    [
        "", "JSON", "JSON {", "JSON []", 'JSON {"named_metrics": {"a": "b"}}', "XML <a/>", "TEXT named_metrics.a=b",
        "BIN !", "BIN /////w==", "TEXT named_metrics.num_requests_waiting=-1", "TEXT named_metrics.num_requests_waiting=nan",
        "TEXT " + "a" * 8192,
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_an_error(header: str) -> None:
    with pytest.raises(OrcaError):
        read_orca({"endpoint-load-metrics": header})


@given(st.sampled_from(["JSON ", "TEXT ", "BIN "]), st.text(max_size=60))
def test_any_header_is_load_or_an_error(form: str, content: str) -> None:
    with contextlib.suppress(OrcaError):
        assert isinstance(read_orca({"endpoint-load-metrics": form + content}), OrcaLoad | None)


def test_what_the_header_leaves_out_is_as_the_last_report_said() -> None:
    last = EngineReport(at_s=1.0, waiting=9, running=5, kv_usage=0.9, block_size_tokens=16, gpu_blocks=100)
    assert OrcaLoad(waiting=3, kv_usage=0.4).onto(last, 2.0) == EngineReport(
        at_s=2.0, waiting=3, running=5, kv_usage=0.4, block_size_tokens=16, gpu_blocks=100
    )
    assert OrcaLoad(running=2).onto(last, 2.0) == EngineReport(
        at_s=2.0, waiting=9, running=2, kv_usage=0.9, block_size_tokens=16, gpu_blocks=100
    )


def test_a_first_report_needs_queue_and_usage() -> None:
    assert OrcaLoad(kv_usage=0.4).onto(None, 2.0) is None
    assert OrcaLoad(waiting=3, kv_usage=0.4).onto(None, 2.0) == EngineReport(at_s=2.0, waiting=3, kv_usage=0.4)
