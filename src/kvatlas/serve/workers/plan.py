"""What each worker process runs: the supervisor's settings with addresses of its own; and when one is started again. No IO."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from kvatlas.config import Config
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
    for name, port in (("api.port", config.api.port), ("api.grpcPort", config.api.grpc_port)):
        if port + workers - 1 > 65535:
            raise ConfigError(name, f"worker {workers - 1} would listen at {port + workers - 1}", "ports up to 65535")


def plan_of(config: Config, worker: Worker, proxy_port: int) -> Plan:
    """Return what a worker runs: the proxy's port is shared, API and gRPC are at the configured ports + its number."""
    api, number = config.api, worker.number
    own = replace(
        config,
        proxy=replace(config.proxy, port=proxy_port, reuse_port=True),
        api=replace(api, port=_own(api.port, number), grpc_port=_own(api.grpc_port, number)),
        zmq=replace(config.zmq, bind=False),
    )
    return Plan(worker, own)


def _own(port: int, number: int) -> int:
    return port + number if port else 0


def restart_in_s(failures: int) -> float:
    """Return how long to wait before a worker is started again that died ``failures`` times in a row, each soon."""
    return min(RESTART_S_MAX, RESTART_S_MIN * float(1 << min(failures - 1, 16)))
