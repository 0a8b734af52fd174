"""A small API server on loopback: Kubernetes' list and watch routes over objects in memory, with versions that expire."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

PODS = "/api/v1/namespaces/{namespace}/pods"
POOLS = "/apis/{group}/{version}/namespaces/{namespace}/inferencepools"

Object = dict[str, Any]


def pod(name: str, ip: str | None = "10.0.0.7", *, ready: bool = True, labels: dict[str, str] | None = None) -> Object:
    """Return a pod, as far as discovery looks at it."""
    return {
        "metadata": {"name": name, "namespace": "prod", "labels": {"app": "llama", **(labels or {})}},
        "status": {
            "phase": "Running",
            **({} if ip is None else {"podIP": ip}),
            "conditions": [
                {"type": "Initialized", "status": "True"},
                {"type": "Ready", "status": "True" if ready else "False"},
            ],
        },
    }


def pool(name: str, *ports: int, app: str = "llama") -> Object:
    """Return an InferencePool of v1."""
    spec = {"selector": {"matchLabels": {"app": app}}, "targetPorts": [{"number": port} for port in ports]}
    return {"metadata": {"name": name, "namespace": "prod"}, "spec": spec}


class KubeApi:
    """Objects, their history, and what was asked."""

    def __init__(self) -> None:
        self.version = 1
        self.oldest = 1
        """Watches from an older version are refused: expired."""
        self.objects: dict[tuple[str, str], Object] = {}
        self.history: list[tuple[int, str, str, Object]] = []
        """Version, kind, type, object."""
        self.happened = asyncio.Condition()
        self.pool_versions = {"v1"}
        self.status: int | None = None
        """Answer everything with this."""
        self.asked: Counter[str] = Counter()
        self.authorization: str | None = None
        self.streams: set[asyncio.Task[Any]] = set()
        self.url = ""

    async def put(self, kind: str, item: Object) -> None:
        """Add an object, or change it."""
        key = (kind, item["metadata"]["name"])
        await self._happen(kind, "MODIFIED" if key in self.objects else "ADDED", item)
        self.objects[key] = item

    async def delete(self, kind: str, name: str) -> None:
        await self._happen(kind, "DELETED", self.objects.pop((kind, name)))

    async def expire(self) -> None:
        """Forget the history, and end all watches with 410."""
        async with self.happened:
            self.version += 10
            self.oldest = self.version
            self.happened.notify_all()

    def cut(self) -> None:
        """Break off all watches."""
        for stream in self.streams:
            stream.cancel()

    async def _happen(self, kind: str, change: str, item: Object) -> None:
        async with self.happened:
            self.version += 1
            item["metadata"]["resourceVersion"] = str(self.version)
            self.history.append((self.version, kind, change, json.loads(json.dumps(item))))
            self.happened.notify_all()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        kind = "pods" if request.path.endswith("/pods") else "pools"
        watching = request.query.get("watch") in ("true", "True")
        self.asked[f"{'watch' if watching else 'list'} {kind}"] += 1
        self.authorization = request.headers.get("Authorization")
        if self.status is not None:
            return web.json_response({"kind": "Status", "code": self.status}, status=self.status)
        if kind == "pools" and request.match_info["version"] not in self.pool_versions:
            return web.json_response({"kind": "Status", "code": 404}, status=404)
        if not watching:
            items = [one for (of, _), one in self.objects.items() if of == kind and _selected(request, one)]
            first = int(request.query.get("continue", "0"))
            size = min(2, int(request.query["limit"]))
            more = {"continue": str(first + size)} if len(items) > first + size else {}
            metadata = {"resourceVersion": str(self.version), **more}
            return web.json_response({"kind": "List", "metadata": metadata, "items": items[first : first + size]})
        task = asyncio.current_task()
        assert task is not None
        self.streams.add(task)
        try:
            return await self._stream(request, kind)
        finally:
            self.streams.discard(task)

    async def _stream(self, request: web.Request, kind: str) -> web.StreamResponse:
        seen = int(request.query["resourceVersion"])
        stream = web.StreamResponse()
        await stream.prepare(request)
        while True:
            async with self.happened:
                await self.happened.wait_for(lambda after=seen: self.version > after)
            if seen < self.oldest:
                await _send(stream, "ERROR", {"kind": "Status", "code": 410, "message": "too old resource version"})
                return stream
            for version, of, change, item in self.history:
                if version > seen and of == kind and _selected(request, item):
                    await _send(stream, change, item)
            seen = self.version
            await _send(stream, "BOOKMARK", {"metadata": {"resourceVersion": str(seen)}})


def _selected(request: web.Request, item: Object) -> bool:
    labels = request.query.get("labelSelector", "")
    fields = request.query.get("fieldSelector", "")
    mine = item["metadata"].get("labels", {})
    wanted = [part.split("=") for part in labels.split(",") if part]
    return all(mine.get(name) == value for name, value in wanted) and fields in (
        "",
        f"metadata.name={item['metadata']['name']}",
    )


async def _send(stream: web.StreamResponse, change: str, item: Object) -> None:
    await stream.write(json.dumps({"type": change, "object": item}).encode() + b"\n")


@asynccontextmanager
async def kube_api() -> AsyncIterator[KubeApi]:
    """Serve on a free port for as long as the block lasts."""
    api = KubeApi()
    application = web.Application()
    application.router.add_get(PODS, api.answer)
    application.router.add_get(POOLS, api.answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    api.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield api
    finally:
        api.cut()
        await runner.cleanup()


def write_kubeconfig(path: Path, url: str) -> None:
    """Write a kubeconfig for that server, with a token and the namespace ``prod``."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": url}}],
        "users": [{"name": "me", "user": {"token": "secret"}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "prod"}}],
    }
    path.write_text(json.dumps(config))
