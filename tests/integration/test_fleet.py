"""Discovery, polls and health together keep a router informed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kvatlas.config.layers import build
from kvatlas.config.route import KubernetesSettings, RouteSettings
from kvatlas.discovery.file import FileDiscovery
from kvatlas.discovery.fleet import Fleet, make_discovery
from kvatlas.discovery.health import HealthState
from kvatlas.discovery.kubernetes import KubernetesDiscovery
from kvatlas.discovery.metrics import DiscoveryMetrics
from kvatlas.discovery.static import StaticDiscovery
from kvatlas.errors import ConfigError
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.plugins import Conclusion
from kvatlas.route.router import Router
from kvatlas.route.scheduler import Scheduler
from tests.integration.engines import engine, until, vllm_page
from tests.models.following import beside, write_at_once

A = EndpointName("default/a")
B = EndpointName("default/b")


class NoProfiles:
    """A handler that is never asked here."""

    def next_profiles(self, *_: object) -> list[str]:
        return []

    def conclude(self, *_: object) -> Conclusion | None:
        return None


def idle_router() -> Router:
    return Router(Scheduler((), {}, NoProfiles(), failed=lambda _name, _error: None), {})


def write(path: Path, **ports: int) -> None:
    endpoints = [{"name": name, "address": "127.0.0.1", "port": port} for name, port in ports.items()]
    write_at_once(path, json.dumps({"endpoints": endpoints}))


async def test_a_router_learns_who_is_there_how_busy_and_how_healthy(tmp_path: Path) -> None:
    file = tmp_path / "endpoints.json"
    registry = CollectorRegistry()
    metrics = DiscoveryMetrics(registry)
    settings = build(
        RouteSettings,
        {"endpointsFile": str(file), "watchInterval": "10ms", "polls": {"interval": "10ms", "backoffMax": "50ms"}},
    )
    router = idle_router()
    async with engine(vllm_page(waiting=3)) as a:
        write(file, a=a.port)
        fleet = Fleet(make_discovery(settings, metrics), router, settings, metrics)
        async with beside(fleet.run()):
            async with engine(vllm_page(waiting=5)) as b:
                await until(lambda: router.load(A).report is not None)
                assert fleet.found.is_set()
                write(file, a=a.port, b=b.port)
                await until(lambda: router.load(B).report is not None)
                assert [one.name for one in router.endpoints] == [A, B]
                report = router.load(B).report
                assert report is not None
                assert report.waiting == 5
            await until(lambda: fleet.health.state(B) is HealthState.UNREACHABLE)
            assert fleet.health.healthy(A)
            shown = generate_latest(registry).decode()
            assert 'kvatlas_route_endpoints{state="healthy"} 1.0' in shown
            assert 'kvatlas_route_endpoints{state="unreachable"} 1.0' in shown
            assert 'kvatlas_route_polls_total{outcome="reported"}' in shown
            assert "kvatlas_route_pool_changes_total 2.0" in shown
            write(file, a=a.port)
            await until(lambda: len(router.endpoints) == 1)
            assert fleet.health.states() == {A: HealthState.HEALTHY}


async def test_a_bad_file_at_the_start_ends_it(tmp_path: Path) -> None:
    settings = RouteSettings(endpoints_file=str(tmp_path / "none"))
    fleet = Fleet(make_discovery(settings, DiscoveryMetrics(CollectorRegistry())), idle_router(), settings)
    with pytest.raises(ConfigError, match="none: is no file"):
        await fleet.run()


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (RouteSettings(endpoints=("http://h",)), StaticDiscovery),
        (RouteSettings(endpoints_file="f"), FileDiscovery),
        (RouteSettings(kubernetes=KubernetesSettings(pool="p")), KubernetesDiscovery),
    ],
)
def test_settings_choose_the_discovery(settings: RouteSettings, kind: type) -> None:
    assert isinstance(make_discovery(settings, DiscoveryMetrics(CollectorRegistry())), kind)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (RouteSettings(), "route.endpoints: is missing"),
        (RouteSettings(endpoints=("http://h",), endpoints_file="f"), "route.endpoints: is given beside another source"),
        (RouteSettings(endpoints=("h",)), r"route.endpoints\[0\]: 'h' is no URL of an engine"),
    ],
)
def test_settings_that_choose_none_or_several_are_refused(settings: RouteSettings, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_discovery(settings, DiscoveryMetrics(CollectorRegistry()))


def test_engines_whose_events_urls_name_are_told() -> None:
    told: list[str] = []
    settings = RouteSettings(endpoints=("http://h?kvEvents=tcp://h:5557",))
    make_discovery(
        settings, DiscoveryMetrics(CollectorRegistry()), lambda engines: told.extend(one.endpoint for one in engines)
    )
    assert told == ["tcp://h:5557"]
