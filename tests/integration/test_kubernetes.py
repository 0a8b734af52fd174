"""Endpoints from a cluster, against an HTTP server with Kubernetes' list and watch routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvatlas.config.quantities import Seconds
from kvatlas.config.route import KubernetesSettings
from kvatlas.discovery.kubernetes import KubernetesDiscovery
from kvatlas.errors import ConfigError
from kvatlas.route.endpoint import Endpoint
from tests.integration.engines import until
from tests.integration.kube_api import KubeApi, kube_api, pod, pool, write_kubeconfig
from tests.models.following import beside

pytest.importorskip("kubernetes_asyncio")


class Told:
    """What discovery told."""

    def __init__(self) -> None:
        self.endpoints: Sequence[Endpoint] | None = None
        self.changes = 0
        self.failures = 0

    def changed(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = endpoints
        self.changes += 1

    def failed(self) -> None:
        self.failures += 1

    @property
    def urls(self) -> list[str] | None:
        return None if self.endpoints is None else [endpoint.authority for endpoint in self.endpoints]

    async def until(self, *urls: str) -> None:
        await until(lambda: self.urls == list(urls))


@asynccontextmanager
async def discovering(api: KubeApi, folder: Path, **settings: object) -> AsyncIterator[Told]:
    told = Told()
    config = folder / "kubeconfig"
    write_kubeconfig(config, api.url)
    wanted = KubernetesSettings(kubeconfig=str(config), retry_max=Seconds(0.3), **settings)  # type: ignore[arg-type]
    async with beside(KubernetesDiscovery(wanted, failed=told.failed).run(told.changed)):
        yield told


async def test_ready_pods_of_a_pool_are_endpoints_one_for_each_port(tmp_path: Path) -> None:
    async with kube_api() as api:
        await api.put("pools", pool("llama", 8000, 8001))
        await api.put("pods", pod("a", "10.0.0.7", labels={"llm-d.ai/engine-type": "sglang", "llm-d.ai/role": "decode"}))
        await api.put("pods", pod("b", "10.0.0.8", ready=False))
        await api.put("pods", pod("c", None))
        await api.put("pods", pod("d", "10.0.0.9", labels={"app": "other"}))
        async with discovering(api, tmp_path, pool="llama") as told:
            await told.until("10.0.0.7:8000", "10.0.0.7:8001")
            assert told.endpoints is not None
            first, second = told.endpoints
            assert (first.name, first.pod, first.engine) == ("prod/a-rank-0", "10.0.0.7:8000", "sglang")
            assert first.labels["llm-d.ai/role"] == "decode"
            assert second.name == "prod/a-rank-1"
            assert api.authorization == "Bearer secret"
            assert told.failures == 0


async def test_pods_that_come_change_and_go_are_seen(tmp_path: Path) -> None:
    async with kube_api() as api:
        await api.put("pools", pool("llama", 8000))
        await api.put("pods", pod("a", "10.0.0.7"))
        async with discovering(api, tmp_path, pool="llama") as told:
            await told.until("10.0.0.7:8000")
            await api.put("pods", pod("b", "10.0.0.8"))
            await told.until("10.0.0.7:8000", "10.0.0.8:8000")
            await api.put("pods", pod("a", "10.0.0.7", ready=False))
            await told.until("10.0.0.8:8000")
            going = pod("b", "10.0.0.8")
            going["metadata"]["deletionTimestamp"] = "2026-11-22T18:00:00Z"
            await api.put("pods", going)
            await told.until()
            await api.put("pods", pod("a", "10.0.0.9"))
            await told.until("10.0.0.9:8000")
            await api.delete("pods", "a")
            await told.until()


async def test_a_change_of_the_pool_selects_anew(tmp_path: Path) -> None:
    async with kube_api() as api:
        await api.put("pods", pod("a", "10.0.0.7"))
        await api.put("pods", pod("b", "10.0.0.8", labels={"app": "qwen"}))
        async with discovering(api, tmp_path, pool="chat") as told:
            await told.until()
            await api.put("pools", pool("chat", 8000))
            await told.until("10.0.0.7:8000")
            await api.put("pools", pool("chat", 9000))
            await told.until("10.0.0.7:9000")
            await api.put("pools", pool("chat", 9000, app="qwen"))
            await told.until("10.0.0.8:9000")
            await api.put("pods", pod("c", "10.0.0.9", labels={"app": "qwen"}))
            await told.until("10.0.0.8:9000", "10.0.0.9:9000")
            await api.delete("pools", "chat")
            await told.until()


async def test_an_older_cluster_knows_pools_in_v1alpha2(tmp_path: Path) -> None:
    async with kube_api() as api:
        api.pool_versions = {"v1alpha2"}
        older = pool("llama")
        older["spec"] = {"selector": {"app": "llama"}, "targetPortNumber": 8000}
        await api.put("pools", older)
        await api.put("pods", pod("a", "fd00::7"))
        async with discovering(api, tmp_path, pool="llama", events_name="name") as told:
            await told.until("[fd00::7]:8000")
            assert told.endpoints is not None
            assert told.endpoints[0].pod == "a"


async def test_a_selector_needs_no_pool(tmp_path: Path) -> None:
    async with kube_api() as api:
        for number in range(5):
            await api.put("pods", pod(f"p{number}", f"10.0.0.{number}"))
        async with discovering(api, tmp_path, selector="app=llama", target_ports=(8000,), events_name="ip") as told:
            await told.until(*(f"10.0.0.{number}:8000" for number in range(5)))
            assert api.asked["list pods"] == 3, "two a page"
            assert api.asked["list pools"] == 0
            assert told.endpoints is not None
            assert told.endpoints[0].pod == "10.0.0.0"


async def test_an_expired_watch_lists_again(tmp_path: Path) -> None:
    async with kube_api() as api:
        await api.put("pods", pod("a", "10.0.0.7"))
        async with discovering(api, tmp_path, selector="app=llama", target_ports=(8000,)) as told:
            await told.until("10.0.0.7:8000")
            await until(lambda: api.asked["watch pods"] == 1)
            api.objects["pods", "b"] = pod("b", "10.0.0.8")  # nobody is told
            await api.expire()
            await told.until("10.0.0.7:8000", "10.0.0.8:8000")
            await api.put("pods", pod("c", "10.0.0.9"))
            await told.until("10.0.0.7:8000", "10.0.0.8:8000", "10.0.0.9:8000")
            assert told.failures == 0


async def test_endpoints_stay_while_the_api_server_is_away_and_that_is_counted_once(tmp_path: Path) -> None:
    async with kube_api() as api:
        await api.put("pods", pod("a", "10.0.0.7"))
        async with discovering(api, tmp_path, selector="app=llama", target_ports=(8000,)) as told:
            await told.until("10.0.0.7:8000")
            await until(lambda: api.asked["watch pods"] == 1)
            api.status = 503
            asked = api.asked["list pods"]
            api.cut()
            await until(lambda: api.asked["list pods"] >= asked + 3)
            assert (told.urls, told.changes) == (["10.0.0.7:8000"], 1)
            assert told.failures <= 2, "the watch that broke, and the lists that are refused"
            api.status = None
            await api.put("pods", pod("b", "10.0.0.8"))
            await told.until("10.0.0.7:8000", "10.0.0.8:8000")


async def test_a_cluster_without_pools_is_a_failure_and_asked_again(tmp_path: Path) -> None:
    async with kube_api() as api:
        api.pool_versions = set()
        async with discovering(api, tmp_path, pool="llama") as told:
            await until(lambda: told.failures >= 1 and api.asked["list pools"] >= 4)
            await api.put("pools", pool("llama", 8000))
            await api.put("pods", pod("a", "10.0.0.7"))
            api.pool_versions = {"v1"}
            await told.until("10.0.0.7:8000")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (KubernetesSettings(), "needs a pool or a selector"),
        (KubernetesSettings(pool="a", selector="b=c", target_ports=(1,)), "needs a pool or a selector"),
        (KubernetesSettings(selector="b=c"), "is missing beside a selector"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: KubernetesSettings, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        KubernetesDiscovery(settings)


async def test_no_api_server_known_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    settings = KubernetesSettings(pool="a", kubeconfig=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no API server is known"):
        await KubernetesDiscovery(settings).run(lambda _: None)
