"""The gRPC health service, for any of our ports. Source: grpc.health.v1."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import DecodeError
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from kvatlas.serve.h2.calls import Call, Method


class Health:
    """What health checks are told, by service."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._watchers: set[_Watch] = set()

    @property
    def methods(self) -> Mapping[str, Method]:
        """Both methods, by path."""
        return {
            "/grpc.health.v1.Health/Check": lambda call: _Check(self, call),
            "/grpc.health.v1.Health/Watch": lambda call: _Watch(self, call),
        }

    def set(self, service: str, serving: bool) -> None:
        """Say whether a service works; whoever watches it is told."""
        self._serving[service] = serving
        for watcher in list(self._watchers):
            watcher.changed(service)

    def status(self, service: str) -> HealthCheckResponse | None:
        """Return what is told of a service; None where it is not known."""
        serving = self._serving.get(service)
        if serving is None:
            return None
        return HealthCheckResponse(status=HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING)

    def watch(self, watcher: _Watch) -> None:
        self._watchers.add(watcher)

    def unwatch(self, watcher: _Watch) -> None:
        self._watchers.discard(watcher)


class _Check:
    def __init__(self, health: Health, call: Call) -> None:
        self._health = health
        self._call = call

    def received(self, message: bytes) -> None:
        service = _service(self._call, message)
        if service is None:
            return
        status = self._health.status(service)
        if status is None:
            self._call.end(StatusCode.NOT_FOUND, "there is no such service here")
            return
        self._call.send(status.SerializeToString())
        self._call.end()

    def half_closed(self) -> None:
        self._call.end(StatusCode.INVALID_ARGUMENT, "no service was named")

    def closed(self) -> None:
        pass


class _Watch:
    def __init__(self, health: Health, call: Call) -> None:
        self._health = health
        self._call = call
        self._service: str | None = None

    def received(self, message: bytes) -> None:
        if self._service is None:
            self._service = _service(self._call, message)
            if self._service is not None:
                self._health.watch(self)
                self.changed(self._service)

    def changed(self, service: str) -> None:
        if service == self._service:
            status = self._health.status(service) or HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN)
            self._call.send(status.SerializeToString())

    def half_closed(self) -> None:
        pass

    def closed(self) -> None:
        self._health.unwatch(self)


def _service(call: Call, message: bytes) -> str | None:
    try:
        return HealthCheckRequest.FromString(message).service
    except DecodeError:
        call.end(StatusCode.INVALID_ARGUMENT, "this is no HealthCheckRequest")
        return None
