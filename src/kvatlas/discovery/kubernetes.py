"""Endpoints from a Kubernetes cluster: the ready pods of an InferencePool, or of a label selector (``kvatlas[kubernetes]``)."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kvatlas.config.route import KubernetesSettings
from kvatlas.discovery.follow import Follower, List, Objects
from kvatlas.discovery.pods import BadObjectError, PoolSpec, endpoints_of_pods, pool_spec
from kvatlas.errors import ConfigError
from kvatlas.observe.logs import get_logger
from kvatlas.route.endpoint import Endpoint

log = get_logger("kvatlas.discovery")

POOL_VERSIONS = (("inference.networking.k8s.io", "v1"), ("inference.networking.x-k8s.io", "v1alpha2"))
"""Groups and versions in which a cluster may know InferencePools; asked for in this order."""

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

Changed = Callable[[Sequence[Endpoint]], None]


class KubernetesDiscovery:
    """Tells the ready pods. While the API server is away they stay as they were, and it is asked again at growing intervals.

    Needs ``get, list, watch`` on pods, and on inferencepools where a pool is given.
    """

    def __init__(self, settings: KubernetesSettings, *, failed: Callable[[], None] = lambda: None) -> None:
        """``failed``: told of each new problem. Raises ConfigError where settings contradict each other."""
        if (settings.pool is None) == (settings.selector is None):
            raise ConfigError("route.kubernetes", "needs a pool or a selector", "one of pool and selector")
        if settings.selector is not None and not settings.target_ports:
            raise ConfigError("route.kubernetes.targetPorts", "is missing beside a selector", "a list of ports: [8000]")
        self._settings = settings
        self._count_failure = failed
        self._problem: str | None = None
        self._random = random.Random()  # noqa: S311  spreads load, guards nothing
        self._told: list[Endpoint] | None = None

    async def run(self, changed: Changed) -> None:
        """Tell endpoints until cancelled. Raises ConfigError where it is not known how to reach an API server."""
        client, configuration, namespace = await _connect(self._settings)
        async with client.ApiClient(configuration) as api:
            pods = partial(client.CoreV1Api(api).list_namespaced_pod, namespace)
            if self._settings.selector is not None:
                spec = PoolSpec(self._settings.selector, self._settings.target_ports)
                await self._follow_pods(pods, spec, changed)
            else:
                await self._follow_pool(client.CustomObjectsApi(api).list_namespaced_custom_object, pods, namespace, changed)

    async def _follow_pool(self, pools: List, pods: List, namespace: str, changed: Changed) -> None:
        options = {"field_selector": f"metadata.name={self._settings.pool}"}
        async with asyncio.TaskGroup() as group:
            following = _Current(group)
            while True:
                for group_name, version in POOL_VERSIONS:
                    of_version: List = partial(pools, group_name, version, namespace, "inferencepools")
                    follower = self._follower(of_version, options, unknown_ends=True)
                    await follower.run(lambda found: self._select(found, pods, following, changed))
                await asyncio.sleep(self._settings.retry_max)

    def _select(self, found: Objects, pods: List, following: _Current, changed: Changed) -> None:
        """Follow the pods of the pool as it is now. Without a pool there are none."""
        pool = found.get(self._settings.pool or "")
        if pool is None:
            log.warning("there is no such InferencePool, and so no endpoint", pool=self._settings.pool)
            following.stop()
            self._tell([], changed)
            return
        try:
            spec = pool_spec(pool)
        except BadObjectError as error:
            self._failed(str(error))
            return
        if self._settings.target_ports:
            spec = PoolSpec(spec.selector, self._settings.target_ports)
        if following.spec != spec:
            following.start(spec, self._follow_pods(pods, spec, changed))

    async def _follow_pods(self, pods: List, spec: PoolSpec, changed: Changed) -> None:
        def pods_changed(found: Objects) -> None:
            self._tell(endpoints_of_pods(found.values(), spec.ports, self._settings.events_name), changed)

        await self._follower(pods, {"label_selector": spec.selector}).run(pods_changed)

    def _follower(self, list_objects: List, options: dict[str, str], *, unknown_ends: bool = False) -> Follower:
        return Follower(
            list_objects,
            options=options,
            retry_max_s=self._settings.retry_max,
            failed=self._failed,
            recovered=self._recovered,
            random=self._random,
            unknown_ends=unknown_ends,
        )

    def _tell(self, endpoints: list[Endpoint], changed: Changed) -> None:
        if endpoints != self._told:
            self._told = endpoints
            changed(endpoints)

    def _failed(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            self._count_failure()
            log.warning("Kubernetes discovery failed; endpoints stay as they were", problem=problem)

    def _recovered(self) -> None:
        if self._problem is not None:
            self._problem = None
            log.info("Kubernetes discovery works again")


class _Current:
    """The pods that are followed now, as a task."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self.spec: PoolSpec | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, spec: PoolSpec, following: Coroutine[None, None, None]) -> None:
        self.stop()
        self.spec = spec
        self._task = self._group.create_task(following)

    def stop(self) -> None:
        self.spec = None
        if self._task is not None:
            self._task.cancel()
            self._task = None


async def _connect(settings: KubernetesSettings) -> tuple[Any, Any, str]:
    """Return the client library, how to reach the API server, and the namespace."""
    try:
        from kubernetes_asyncio import client, config
    except ImportError:
        problem = "needs a package that is not installed"
        raise ConfigError("route.kubernetes", problem, 'pip install "kvatlas[kubernetes]"') from None
    configuration = client.Configuration()
    try:
        if settings.kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            namespace = await asyncio.to_thread(_NAMESPACE_FILE.read_text)
        else:
            loader = await config.load_kube_config(
                config_file=settings.kubeconfig, client_configuration=configuration, persist_config=False
            )
            namespace = (loader.current_context or {}).get("context", {}).get("namespace") or "default"
    except (config.ConfigException, OSError) as error:
        raise ConfigError(
            "route.kubernetes", f"no API server is known: {error}", "a kubeconfig, or a pod's service account"
        ) from None
    return client, configuration, settings.namespace or namespace.strip()
