"""What each worker process runs: the supervisor's settings with addresses of its own; and when one is started again. No IO."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import replace

from kvatlas.config import Config
from kvatlas.config.layers import build
from kvatlas.errors import ConfigError
from kvatlas.serve.workers.worker import Worker

RESTART_S_MIN = 0.5
RESTART_S_MAX = 30.0
SETTLED_S = 60.0
"""A worker that ran for so long is started again as if it had never died."""


class Plan(msgspec.Struct, frozen=True):
    """What a worker process is given."""

    worker: Worker
    config: Config
    directory: str
    """Where workers' sockets are; the supervisor removes it, or who outlives that."""


def write_plan(plan: Plan) -> bytes:
    """Return a plan for :func:`read_plan`, secrets included: for a pipe to a process of one's own."""
    settings = msgspec.to_builtins(plan.config, enc_hook=str.__str__)
    return msgspec.msgpack.encode(_Written(plan.worker, settings, plan.directory))


def read_plan(data: bytes) -> Plan:
    """Return what :func:`write_plan` wrote."""
    written = msgspec.msgpack.decode(data, type=_Written)
    return Plan(written.worker, build(Config, written.config), written.directory)


class _Written(msgspec.Struct, frozen=True):
    """A plan with its settings as a file has them."""

    worker: Worker
    config: dict[str, Any]
    directory: str


def check(config: Config) -> None:
    """Raise ConfigError for settings that several workers can't share."""
    workers = config.route.workers
    if config.route.front_doors != ("proxy",):
        raise ConfigError(
            "route.workers",
            "only the proxy's connections are spread over workers: Envoy keeps one to its endpoint picker",
            "1, or route.frontDoors: [proxy]; for Envoy several replicas that are each other's route.peers",
        )
    if config.zmq.bind and config.zmq.engines:
        problem = "an engine that connects here would reach one worker only"
        raise ConfigError("zmq.bind", problem, "false: every worker connects to all zmq.engines; or route.workers: 1")
    ports = [("api.port", config.api.port), ("api.grpcPort", config.api.grpc_port)]
    ports += [("route.peers", _port(one)) for one in config.route.peers]
    ports += [("route.peersListen", _port(one)) for one in config.route.peers_listen]
    for name, port in ports:
        if port + workers - 1 > 65535:
            raise ConfigError(name, f"worker {workers - 1} would listen at {port + workers - 1}", "ports up to 65535")


def plan_of(config: Config, worker: Worker, proxy_port: int, directory: str) -> Plan:
    """Return what a worker runs: the proxy's port is shared, all others are the configured ones + its number.

    Workers hear of each other through sockets in ``directory``, and of every worker of other replicas, which have as many.
    """
    api, route, number = config.api, config.route, worker.number
    others = [f"ipc://{directory}/{other}" for other in range(worker.of) if other != number]
    remote = [_at(peer, other) for peer in route.peers for other in range(worker.of)]
    own = replace(
        config,
        proxy=replace(config.proxy, port=proxy_port, reuse_port=True),
        api=replace(api, port=_own(api.port, number), grpc_port=_own(api.grpc_port, number)),
        zmq=replace(config.zmq, bind=False),
        route=replace(
            route,
            peers=(*others, *dict.fromkeys(remote)),
            peers_listen=(f"ipc://{directory}/{number}", *(_at(address, number) for address in route.peers_listen)),
        ),
    )
    return Plan(worker, own, directory)


def _own(port: int, number: int) -> int:
    return port + number if port else 0


def _port(address: str) -> int:
    return int(address.rpartition(":")[2]) if address.startswith("tcp:") else 0


def _at(address: str, number: int) -> str:
    """Return a worker's own address of one that all have: the next ports, or names."""
    before, separator, port = address.rpartition(":")
    return f"{before}{separator}{int(port) + number}" if address.startswith("tcp:") else f"{address}.{number}"


def restart_in_s(failures: int) -> float:
    """Return how long to wait before a worker is started again that died ``failures`` times in a row, each soon."""
    return min(RESTART_S_MAX, RESTART_S_MIN * float(1 << min(failures - 1, 16)))
