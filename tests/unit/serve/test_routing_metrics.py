"""What an operator sees of admission and of prefix producers."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kvatlas.config import load_config
from kvatlas.discovery.endpoints import pool_from_urls
from kvatlas.errors import ConfigError, KvatlasError
from kvatlas.indexer import Indexer
from kvatlas.observe.metrics import Metrics
from kvatlas.route.flow.settings import FlowControl
from kvatlas.route.picker_config import build_router, read_config
from kvatlas.route.request import RouteRequest
from kvatlas.route.router import Router
from kvatlas.serve.admission import Admission, AdmissionEnd, admission_of
from kvatlas.serve.routing.admission_metrics import OTHER, PRIORITIES_MAX, AdmissionMetrics
from kvatlas.serve.routing.picker import picker_of
from kvatlas.serve.routing.producer_metrics import ProducersCollector
from kvatlas.serve.routing.setup import Routing
from kvatlas.tokens.tokenization import Tokenization

HISTORY = """
plugins:
- {type: blended-prefix-cache-producer}
- {type: approx-prefix-cache-producer, name: small, parameters: {historyBytesMax: 1000}}
- {type: precise-prefix-cache-producer, parameters: {speculativeTTL: 3s}}
- {type: queue-scorer}
schedulingProfiles: [{name: default, plugins: [{pluginRef: queue-scorer}]}]
"""


class Waiting:
    """An admission with metrics, before a pool that is empty: everybody waits."""

    def __init__(self, *, flow_control: bool = True) -> None:
        self.now_s = 100.0
        self.registry = CollectorRegistry()
        metrics = AdmissionMetrics(self.registry)
        self.router: Router = build_router(read_config(""))
        self.admission: Admission = admission_of(
            self.router, FlowControl(), flow_control=flow_control, clock=lambda: self.now_s, observer=metrics
        )
        metrics.watch(self.admission.stats)

    def value(self, name: str, **labels: Any) -> float | None:
        return self.registry.get_sample_value(f"kvatlas_route_{name}", {key: str(value) for key, value in labels.items()})

    async def waits(self, priority: int, body_bytes: int) -> asyncio.Task[None]:
        task = asyncio.create_task(self.admission.admit(RouteRequest(id="r", model="m", priority=priority), body_bytes))
        await asyncio.sleep(0)
        return task


async def test_what_waits_is_shown_by_priority_and_counted_when_it_ends() -> None:
    one = Waiting()
    first, second = await one.waits(0, 100), await one.waits(5, 30)
    assert (one.value("waiting_requests", priority=0), one.value("waiting_bytes", priority=0)) == (1, 100)
    assert (one.value("waiting_requests", priority=5), one.value("waiting_bytes", priority=5)) == (1, 30)
    one.now_s += 2.0
    first.cancel()
    await asyncio.wait({first})
    one.admission.close()
    with pytest.raises(KvatlasError):
        await second
    assert one.value("admissions_total", priority=0, end="cancelled") == 1
    assert one.value("admissions_total", priority=5, end="stopped") == 1
    assert one.value("admission_wait_seconds_sum", priority=5) == 2.0
    assert one.value("waiting_requests", priority=0) == 0


async def test_without_flow_control_nobody_waits() -> None:
    one = Waiting(flow_control=False)
    await one.admission.admit(RouteRequest(id="r", model="m"), 10)
    assert one.value("admissions_total", priority=0, end="admitted") == 1
    assert one.value("admission_wait_seconds_count", priority=0) is None
    assert one.value("waiting_requests", priority=0) is None


async def test_saturation_is_shown_once_somebody_looked() -> None:
    one = Waiting(flow_control=False)
    assert one.value("saturation") is None
    one.router.set_endpoints(pool_from_urls(["http://10.0.0.1:8000"]).endpoints)
    with pytest.raises(KvatlasError):  # nobody reported: as busy as can be
        await one.admission.admit(RouteRequest(id="r", model="m", priority=-1), 10)
    assert one.value("saturation") == 1.0
    assert one.value("admissions_total", priority=-1, end="shed") == 1


def test_priorities_beyond_the_bound_are_counted_together() -> None:
    registry = CollectorRegistry()
    metrics = AdmissionMetrics(registry)
    for priority in range(PRIORITIES_MAX + 3):
        metrics.ended(priority, AdmissionEnd.ADMITTED, 0.0)
    metrics.ended(0, AdmissionEnd.ADMITTED, 0.0)
    labels = {"priority": OTHER, "end": "admitted"}
    assert registry.get_sample_value("kvatlas_route_admissions_total", labels) == 3
    assert registry.get_sample_value("kvatlas_route_admissions_total", {"priority": "0", "end": "admitted"}) == 2


def test_history_and_promises_are_shown_by_producer() -> None:
    router = build_router(read_config(HISTORY))
    router.set_endpoints(pool_from_urls(["http://10.0.0.1:8000"]).endpoints)
    registry = CollectorRegistry()
    producers = ProducersCollector()
    registry.register(producers)
    assert generate_latest(registry)
    producers.watch(router.plugins)
    router.decide(RouteRequest(id="r", model="m", text="a prompt " * 2000))

    def value(name: str, **labels: str) -> float:
        found = registry.get_sample_value(f"kvatlas_route_{name}", labels)
        assert found is not None
        return found

    blocks = value("history_entries", producer="blended-prefix-cache-producer")
    assert blocks == value("history_blocks", producer="blended-prefix-cache-producer") > 10
    assert value("history_bytes", producer="small") <= 1000
    evicted = value("history_evictions_total", producer="small", reason="bytes")
    assert evicted + value("history_entries", producer="small") == blocks
    assert value("promise_seconds", producer="precise-prefix-cache-producer") == 3.0
    assert value("promises_missed_total", producer="blended-prefix-cache-producer") == 0


async def test_what_plugins_make_of_their_parameters_is_logged_when_the_router_is_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "epp.yaml"
    file.write_text(HISTORY.replace("speculativeTTL: 3s", "tokenProcessorConfig: {blockSize: 64}"))
    overrides = (f"route.pickerConfig={file}", 'route.endpoints=["http://10.0.0.1:8000"]')
    config = load_config(environ={}, overrides=overrides)
    indexer = Indexer(config)
    caplog.set_level(logging.INFO, "kvatlas.serve.routing.setup")
    Routing(config, indexer, Tokenization([], Metrics()), picker_of(config.route))
    (told,) = (record.message for record in caplog.records if "precise-prefix-cache-producer" in record.message)
    assert "blockSize" in told
    assert b"kvatlas_route_history_entries" in generate_latest(indexer.metrics.registry)


async def test_plugins_that_do_not_fit_together_are_told_with_the_files_name(tmp_path: Path) -> None:
    file = tmp_path / "epp.yaml"
    file.write_text("{plugins: [{type: queue-scorer}], flowControl: {saturationDetector: {pluginRef: queue-scorer}}}")
    config = load_config(environ={}, overrides=(f"route.pickerConfig={file}", 'route.endpoints=["http://10.0.0.1:8000"]'))
    with pytest.raises(ConfigError) as told:
        Routing(config, Indexer(config), Tokenization([], Metrics()), picker_of(config.route))
    assert told.value.path == f"{file}: flowControl.saturationDetector.pluginRef"
