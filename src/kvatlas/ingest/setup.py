"""From settings to event sources and bounds."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

from kvatlas.config import Config, EngineSettings, RecordingSettings
from kvatlas.ingest.followed import OriginFactory, SourceFactory
from kvatlas.ingest.ingestor import IngestLimits
from kvatlas.ingest.sources import Origin
from kvatlas.ingest.sources.recording import RecordingSource
from kvatlas.ingest.sources.zmq import SocketLimits, ZmqCentralSource, ZmqSource
from kvatlas.ingest.worker import WorkerLimits
from kvatlas.types import DpRank, PodId


def sources_of(config: Config) -> list[SourceFactory]:
    """Return a maker for each configured source: the central address, each engine's ranks, recordings."""
    factories: list[SourceFactory] = []
    if config.zmq.bind:
        factories.append(_central(config))
    for engine in config.zmq.engines:
        factories.extend(make for _, make in engine_sources(config, engine).values())
    factories.extend(_recording(recording) for recording in config.sources.recordings)
    return factories


def limits_of(config: Config) -> IngestLimits:
    """Return the write path's bounds."""
    settings = config.ingest
    return IngestLimits(
        worker=WorkerLimits(settings.queue_frames, drop_when_stale=settings.stale_entries == "drop"),
        socket=_socket_limits(config),
        streams_max=settings.streams_max,
        gone_after_s=settings.gone_after,
        replay_timeout_s=settings.replay_timeout,
        audit_interval_s=settings.audit_interval,
    )


def _socket_limits(config: Config) -> SocketLimits:
    settings = config.zmq
    return SocketLimits(
        settings.receive_high_water_mark, settings.frame_bytes_max, settings.reconnect_min, settings.reconnect_max
    )


def _central(config: Config) -> SourceFactory:
    settings = config.zmq
    origin = Origin(settings.endpoint, replay_endpoint=settings.replay_endpoint)

    return lambda context: ZmqCentralSource(
        context, settings.endpoint, origin, topic_filter=settings.topic_filter, limits=_socket_limits(config)
    )


def engine_sources(config: Config, engine: EngineSettings) -> dict[Hashable, OriginFactory]:
    """Return a maker for each data-parallel rank of an engine, with its origin, by engine and rank."""
    return {(engine, rank): _engine(config, engine, DpRank(rank)) for rank in range(engine.dp_ranks)}


def _engine(config: Config, engine: EngineSettings, rank: DpRank) -> OriginFactory:
    endpoint = _at_rank(engine.endpoint, rank)
    origin = Origin(
        endpoint,
        decoder=engine.decoder,
        pod=PodId(engine.pod) if engine.pod else None,
        model=engine.model,
        fallback_pod=PodId(engine.endpoint.removeprefix("tcp://")),
        dp_rank=rank,
        replay_endpoint=_at_rank(engine.replay_endpoint, rank) if engine.replay_endpoint else None,
    )
    return origin, lambda context: ZmqSource(context, endpoint, origin, limits=_socket_limits(config))


def _recording(recording: RecordingSettings) -> SourceFactory:
    path = Path(recording.path)
    origin = Origin(recording.path, fallback_pod=PodId(path.name))
    return lambda context: RecordingSource(path, origin, recording.speed or 0.0)


def _at_rank(endpoint: str, rank: DpRank) -> str:
    """Return a data-parallel rank's address: rank r is at port + r."""
    address, _, port = endpoint.rpartition(":")
    return f"{address}:{int(port) + rank}"
