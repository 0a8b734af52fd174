"""Endpoints from URLs and from llm-d's file format: what is read, and what is refused."""

from __future__ import annotations

import pytest

from kvatlas.config import EngineSettings
from kvatlas.discovery.endpoints import FILE_BYTES_MAX, pool_from_file, pool_from_urls
from kvatlas.errors import ConfigError

LLMD_FILE = b"""
endpoints:
- name: worker-0
  address: 10.0.0.7
  port: "8000"
  labels: {llm-d.ai/role: decode}
- {name: worker-1, namespace: prod, address: 10.0.0.8, port: "30000", labels: {llm-d.ai/engine-type: sglang}}
"""


def refusal(entry: str) -> str:
    with pytest.raises(ConfigError) as refused:
        pool_from_file(f"endpoints: [{entry}]".encode(), "pool.yaml")
    return str(refused.value)


def test_a_file_as_llm_d_has_it() -> None:
    first, second = pool_from_file(LLMD_FILE, "pool.yaml").endpoints
    assert (first.name, first.url, first.pod, first.engine) == (
        "default/worker-0", "http://10.0.0.7:8000", "10.0.0.7:8000", "vllm"
    )  # fmt: skip
    assert first.labels == {"llm-d.ai/role": "decode"}
    assert not first.names_rank
    assert (second.name, second.authority, second.engine) == ("prod/worker-1", "10.0.0.8:30000", "sglang")
    assert second.metrics_url == "http://10.0.0.8:30000/metrics"


def test_the_same_as_json() -> None:
    content = b'{"endpoints": [{"name": "a", "address": "10.0.0.7", "port": "8000", "metricsHost": "10.0.0.7:9400"}]}'
    (endpoint,) = pool_from_file(content, "pool.json").endpoints
    assert (endpoint.url, endpoint.metrics_url) == ("http://10.0.0.7:8000", "http://10.0.0.7:9400/metrics")


def test_an_empty_list_is_a_pool_of_nobody() -> None:
    assert pool_from_file(b"endpoints: []", "pool.yaml").endpoints == ()


def test_each_rank_behind_an_address_is_an_endpoint() -> None:
    pool = pool_from_file(b"endpoints: [{name: a, address: h, port: 8000, dpRanks: 2, pod: llama-0}]", "pool.yaml")
    assert [(one.name, one.dp_rank, one.names_rank, one.pod, one.port) for one in pool.endpoints] == [
        ("default/a#dp0", 0, True, "llama-0", 8000),
        ("default/a#dp1", 1, True, "llama-0", 8000),
    ]
    assert [str(one.stream) for one in pool.endpoints] == ["llama-0", "llama-0#dp1"]


def test_a_worker_may_say_where_its_events_are() -> None:
    content = b"""
endpoints:
- name: a
  address: 10.0.0.7
  port: 8000
  dpRanks: 2
  kvEvents: {endpoint: "tcp://10.0.0.7:5557", replayEndpoint: "tcp://10.0.0.7:5607", model: llama}
- {name: b, address: 10.0.0.8, port: 8000, engine: sglang, pod: b, kvEvents: {endpoint: "tcp://10.0.0.8:5557"}}
- {name: c, address: 10.0.0.9, port: 8000}
"""
    assert pool_from_file(content, "pool.yaml").engines == (
        EngineSettings(
            endpoint="tcp://10.0.0.7:5557",
            replay_endpoint="tcp://10.0.0.7:5607",
            pod="10.0.0.7:8000",
            model="llama",
            dp_ranks=2,
            decoder="vllm",
        ),
        EngineSettings(endpoint="tcp://10.0.0.8:5557", pod="b", decoder="sglang"),
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{name: a, port: 8000}", "pool.yaml: endpoints[0] (a).address: is missing"),
        ("{address: 10.0.0.7, port: 8000}", "pool.yaml: endpoints[0].name: is missing"),
        ("{name: a, address: 'http://h', port: 8000}", "(a).address: 'http://h' does not fit"),
        ("{name: a, address: h, port: 65536}", "(a).port: 65536 is no port"),
        ("{name: a, address: h, port: 0}", "(a).port: '0' does not fit"),
        ("{name: a, address: h, port: http}", "(a).port: 'http' does not fit"),
        (
            "{name: a, address: h, port: 8000, pot: x}",
            '(a).pot: is no setting; did you mean "',
        ),
        ("{name: a, address: h, port: 8000, labels: {x: 1}}", "(a).labels.x: 1 is no text"),
        ("{name: a, address: h, port: 8000, engine: tgi}", "(a).engine: 'tgi' is none of them; allowed: vllm, sglang"),
        ("{name: a, address: h, port: 8000, dpRanks: 0}", "(a).dpRanks: 0 is out of bounds"),
        ("{name: a/b, address: h, port: 8000}", "(a/b).name: 'a/b' does not fit"),
        ("{name: a, address: h, port: 8000, kvEvents: {endpoint: 'h:1'}}", "(a).kvEvents.endpoint: 'h:1' does not fit"),
        (
            "{name: a, address: h, port: 1, dpRanks: 2, kvEvents: {endpoint: 'tcp://h:65535'}}",
            "(a).kvEvents.endpoint: rank r is at port + r, here 65536",
        ),
        ("{name: a, address: h, port: 1}, {name: a, address: i, port: 1}", "two endpoints are called default/a"),
        ("llama", "pool.yaml: endpoints[0]: 'llama' is no endpoint"),
    ],
)
def test_a_refusal_names_entry_and_field(entry: str, message: str) -> None:
    assert message in refusal(entry)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is no endpoints file"),
        (b"- a", "is no endpoints file"),
        (b"endpoints: {}", "is no endpoints file"),
        (b"endpoints: []\nworkers: []", "is no endpoints file"),
        (b"endpoints: [", "is no YAML at line 1"),
        (b"endpoints: []\nendpoints: []", "'endpoints' is doubled"),
        (b"\xff", "is not UTF-8 at byte 0"),
        (b"#" * (FILE_BYTES_MAX + 1), "is larger than"),
    ],
)
def test_what_is_no_endpoints_file_is_refused(content: bytes, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        pool_from_file(content, "pool.yaml")


def test_more_endpoints_than_can_be_polled_are_refused() -> None:
    entries = ",".join(f"{{name: a{number}, address: h, port: 1, dpRanks: 1024}}" for number in range(10))
    assert "describes more than 10000 endpoints" in refusal(entries)


def test_urls_are_endpoints_named_after_their_address() -> None:
    plain, ranks0, ranks1, secure, v6 = pool_from_urls(
        ["http://10.0.0.7:8000", "http://h:8000/?pod=llama-0&dpRanks=2&engine=sglang", "https://h", "http://[::1]:8000?llm-d.ai/role=prefill"]
    ).endpoints  # fmt: skip
    assert (plain.name, plain.url, plain.pod) == ("default/10.0.0.7:8000", "http://10.0.0.7:8000", "10.0.0.7:8000")
    assert [(one.name, one.pod, one.engine) for one in (ranks0, ranks1)] == [
        ("default/h:8000#dp0", "llama-0", "sglang"),
        ("default/h:8000#dp1", "llama-0", "sglang"),
    ]
    assert (secure.url, secure.port) == ("https://h:443", 443)
    assert (v6.name, v6.url, v6.address, v6.labels) == (
        "default/[::1]:8000", "http://[::1]:8000", "::1", {"llm-d.ai/role": "prefill"}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("written", "meant"), [("dpRank=2", "dpRanks"), ("dp-ranks=2", "dpRanks"), ("Engine=sglang", "engine")]
)
def test_what_is_nearly_a_field_of_a_url_is_no_label(written: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"urls\[0\]: '.*' is no field; did you mean '{meant}'\?"):
        pool_from_urls([f"http://h:8000?{written}"])


def test_a_url_may_say_where_events_are() -> None:
    url = "http://10.0.0.7:8000?kvEvents=tcp://10.0.0.7:5557&replayEndpoint=tcp://10.0.0.7:5607&model=llama"
    assert pool_from_urls([url]).engines == (
        EngineSettings(
            endpoint="tcp://10.0.0.7:5557", replay_endpoint="tcp://10.0.0.7:5607", pod="10.0.0.7:8000", model="llama"
        ),
    )


@pytest.mark.parametrize(
    "url",
    ["10.0.0.7:8000", "ftp://h", "http://", "http://h:99999", "http://u@h", "http://h/v1", "http://h#x", "http://h?dpRanks=x",
     "http://h?pod", "http://[::1", "http://h h"],
)  # fmt: skip
def test_what_is_no_url_of_an_engine_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"urls\[0\]"):
        pool_from_urls([url])
