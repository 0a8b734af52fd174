"""Every setting of kvatlas: parsed and checked once, then frozen.

Names are camelCase in files and snake_case in Python; a duration is held in seconds and a size in bytes. A field's
``description`` is its documentation, wherever that is shown. Precedence: overrides > environment > file > defaults.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta
from msgspec.structs import force_setattr

from kvatlas.config.extproc import ExtProcSettings
from kvatlas.config.kinds import Capacity, Limit, Share, Wait
from kvatlas.config.layers import Secret, SettingDoc, build, describe, read_layers
from kvatlas.config.proxy import ProxySettings
from kvatlas.config.quantities import Bytes, Seconds
from kvatlas.config.route import RouteSettings
from kvatlas.config.tokens import TokenSettings
from kvatlas.errors import ConfigError

__all__ = ["Config", "describe_config", "load_config"]

L = TypeVar("L", "ApiSettings", ProxySettings)
"""Settings of something that listens."""

_TCP = r"tcp://(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):[0-9]{1,5}"
_TCP_FORM = {"allowed": 'an address such as "tcp://10.0.0.7:5557"'}
_BINDABLE = rf"{_TCP}|ipc://\S+"
_PORT = Meta(ge=0, le=65535)


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """One engine that kvatlas connects to."""

    endpoint: Annotated[str, Meta(description="Where the engine publishes its events.", pattern=_TCP, extra=_TCP_FORM)]
    replay_endpoint: Annotated[
        str | None,
        Meta(description="Where it answers replay requests. Without it a lost event leaves the pod stale.", extra=_TCP_FORM),
    ] = None
    pod: Annotated[str | None, Meta(description="The pod's name; by default the one in the events' topic.")] = None
    model: Annotated[str | None, Meta(description="The model's name; by default the one in the events' topic.")] = None
    dp_ranks: Annotated[Limit, Meta(description="Data-parallel ranks; rank r publishes at the endpoint's port + r.")] = 1
    decoder: Annotated[str, Meta(description="How its events are encoded: a decoder's name.")] = "vllm"


class ZmqSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Events over ZeroMQ."""

    endpoint: Annotated[
        str,
        Meta(
            description="The central address: kvatlas binds it, engines connect to it.",
            pattern=_BINDABLE,
            extra={"allowed": 'an address such as "tcp://127.0.0.1:5557", "tcp://*:5557" or "ipc:///run/kvatlas.sock"'},
        ),
    ] = "tcp://127.0.0.1:5557"
    bind: Annotated[
        bool | None, Meta(description="Bind the central address. By default it is bound unless engines are listed.")
    ] = None
    topic_filter: Annotated[str, Meta(description="Only topics that begin with this are received.")] = "kv@"
    engines: Annotated[tuple[EngineSettings, ...], Meta(description="Engines to connect to.")] = ()
    replay_endpoint: Annotated[
        str | None,
        Meta(
            description="Replay address of engines that connect to the central address; {host} and {pod} are filled in.",
            extra={"allowed": 'an address such as "tcp://{host}:5558"; placeholders {host} and {pod}'},
        ),
    ] = None
    receive_high_water_mark: Annotated[
        Limit, Meta(description="Frames that ZeroMQ holds for kvatlas; beyond it frames are lost, and seen as a gap.")
    ] = 100_000
    reconnect_min: Annotated[Wait, Meta(description="First wait before an engine is connected to again.")] = Seconds(0.1)
    reconnect_max: Annotated[Wait, Meta(description="Longest wait between two attempts to connect.")] = Seconds(10)
    frame_bytes_max: Annotated[Capacity, Meta(description="A peer that sends a larger frame is disconnected.")] = Bytes(
        64 << 20
    )

    def __post_init__(self) -> None:
        if self.bind is None:
            force_setattr(self, "bind", not self.engines)


class ApiSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """HTTP and gRPC."""

    host: Annotated[str, Meta(description="Address on which HTTP listens.", min_length=1)] = "127.0.0.1"
    port: Annotated[int, _PORT, Meta(description="HTTP port; 0 takes a free one.")] = 8080
    grpc_host: Annotated[str, Meta(description="Address on which gRPC listens.", min_length=1)] = "127.0.0.1"
    grpc_port: Annotated[int, _PORT, Meta(description="gRPC port; 0 takes a free one.")] = 50051
    token: Annotated[
        Secret | None, Meta(description="Bearer token that every request needs, except health checks. None: no token.")
    ] = None
    token_file: Annotated[str | None, Meta(description="File that holds the token.")] = None
    metrics_open: Annotated[bool, Meta(description="Serve /metrics without the token.")] = False
    dashboard: Annotated[bool, Meta(description="Serve the page that shows the fleet, at /dashboard.")] = True
    tls_cert_file: Annotated[str | None, Meta(description="PEM certificate chain for HTTP and gRPC; needs tlsKeyFile.")] = None
    tls_key_file: Annotated[str | None, Meta(description="PEM private key; needs tlsCertFile.")] = None
    body_bytes_max: Annotated[Capacity, Meta(description="A larger request body or gRPC message is refused.")] = Bytes(16 << 20)
    tokens_max: Annotated[Limit, Meta(description="A query of more token ids is refused.")] = 1_048_576
    keys_max: Annotated[Limit, Meta(description="A locality query of more block keys is refused.")] = 65_536
    concurrency_max: Annotated[
        Limit, Meta(description="Queries in progress or waiting; beyond it the answer is 503 with Retry-After.")
    ] = 256
    connections_max: Annotated[Limit, Meta(description="Open HTTP connections; beyond it new ones are answered with 503.")] = (
        4096
    )
    request_timeout: Annotated[
        Wait, Meta(description="Longest time from a request's first byte to its answer; then 408 or 504.")
    ] = Seconds(30)
    shutdown_grace: Annotated[
        Wait, Meta(description="How long requests in progress may take to finish when the service stops.")
    ] = Seconds(10)


class EngineHashSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """How vLLM hashes blocks, for keys.mode engine. `kvatlas doctor` finds algorithm and seed."""

    algorithm: Annotated[
        Literal["sha256", "sha256_cbor", "xxhash", "xxhash_cbor", "sha256_cbor_64bit"],
        Meta(
            description=(
                "The engines' --prefix-caching-hash-algo. sha256 and xxhash hash a pickle, which may differ between Python "
                "versions, and are computed in Python, the others in the native core."
            )
        ),
    ] = "sha256"
    seed: Annotated[
        str | None,
        Meta(description="The engines' PYTHONHASHSEED; by default it is not set there, which does for sha256 and sha256_cbor."),
    ] = None
    loras: Annotated[
        Mapping[str, str],
        Meta(
            description=(
                "LoRA adapters: name to path, both as the engine has them: it hashes them. With sha256_cbor_64bit: name to the "
                "adapter's number."
            )
        ),
    ] = msgspec.field(default_factory=dict)


class KeySettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Block keys. Services that exchange keys need the same values."""

    mode: Annotated[
        Literal["kvatlas", "engine", "llmd-cbor-fnv", "llmd-xxh64"],
        Meta(
            description=(
                "What a block's key is. kvatlas: our own. engine: the engine's own hash, so that events need no tokens. "
                "llmd-cbor-fnv, llmd-xxh64: as llm-d's indexer computes them."
            )
        ),
    ] = "kvatlas"
    block_size: Annotated[
        int, Meta(ge=1, le=65536, description="Tokens of one index block. In mode engine: the engines' --block-size.")
    ] = 16
    seed: Annotated[
        str, Meta(description="Root of every key; another seed makes all keys incomparable. Not for mode engine.")
    ] = ""
    engine: EngineHashSettings = msgspec.field(default_factory=EngineHashSettings)


class IndexSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """The index: what does the work, and its bounds."""

    core: Annotated[
        Literal["auto", "native", "reference"],
        Meta(
            description="Which implementation does the work: native (Rust), reference (Python); auto: native where installed."
        ),
    ] = "auto"
    ttl: Annotated[Wait, Meta(description="Blocks not stored or asked for again within this time are dropped.")] = Seconds(3600)
    max_size: Annotated[Limit, Meta(description="Blocks held; beyond it the least recently used are dropped.")] = 1_000_000
    max_bytes: Annotated[
        Annotated[Bytes, Meta(ge=1 << 20)],
        Meta(description="Estimated memory; beyond it the least recently used blocks are dropped."),
    ] = Bytes(2 << 30)
    orphans_max: Annotated[
        Limit, Meta(description="Per stream: blocks kept by engine hash while their parent or tokens are unknown.")
    ] = 65_536
    retired_hashes_max: Annotated[
        Limit, Meta(description="Per stream: removed blocks whose engine hash is remembered, for events without tokens.")
    ] = 65_536
    speculative_ttl: Annotated[
        Wait, Meta(description="How long a routed request's blocks count before an event confirms them.")
    ] = Seconds(2)


class IngestSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """From frames to the index."""

    queue_frames: Annotated[
        Limit, Meta(description="Per stream: frames that wait; when full, the stream turns stale and resyncs.")
    ] = 10_000
    stale_entries: Annotated[
        Literal["downweight", "drop", "keep"],
        Meta(description="What becomes of the entries of a stream that lost events."),
    ] = "downweight"
    stale_weight: Annotated[Share, Meta(description="Factor on the score of stale entries that are downweighted.")] = 0.5
    gone_after: Annotated[Wait, Meta(description="A pod whose connection is lost for longer is dropped with its entries.")] = (
        Seconds(60)
    )
    replay_timeout: Annotated[Wait, Meta(description="How long a replay may pause before it counts as failed.")] = Seconds(5)
    audit_interval: Annotated[
        Annotated[Seconds, Meta(ge=0)],
        Meta(description="How often engines are asked whether a last event was lost; 0 turns it off."),
    ] = Seconds(5)
    streams_max: Annotated[
        Limit, Meta(description="Streams followed (a pod's ranks count each); frames of further ones are refused.")
    ] = 4096


DEFAULT_WEIGHTS: Mapping[str, float] = {"gpu": 1.0, "cpu": 0.8, "disk": 0.6, "storage": 0.5}


class TieredCacheSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What a block is worth by where it lies."""

    weights: Annotated[
        Mapping[str, Share], Meta(description="Weight by medium, in lower case; given ones are merged over the defaults.")
    ] = msgspec.field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    unknown_weight: Annotated[Share, Meta(description="Weight of a medium that has none.")] = 0.1

    def __post_init__(self) -> None:
        force_setattr(self, "weights", {**DEFAULT_WEIGHTS, **self.weights})


class RecordingSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """A capture file played as an event source."""

    path: Annotated[str, Meta(description="The capture file, as `kvatlas record` writes it.", min_length=1)]
    speed: Annotated[
        float | None, Meta(description="Factor on the recorded pace; by default the file is read without waiting.", gt=0)
    ] = None


class SourceSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Event sources beyond ZeroMQ."""

    recordings: Annotated[tuple[RecordingSettings, ...], Meta(description="Capture files to play at start.")] = ()


class LogSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Logs, on standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="Least severity that is written.")] = "info"
    format: Annotated[Literal["json", "console"], Meta(description="JSON: one object a line. Console: for people.")] = "json"


class Config(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """All settings. ``Config()`` is a working default on loopback."""

    zmq: ZmqSettings = ZmqSettings()
    api: ApiSettings = ApiSettings()
    keys: KeySettings = KeySettings()
    tokens: TokenSettings = msgspec.field(default_factory=TokenSettings)
    index: IndexSettings = IndexSettings()
    ingest: IngestSettings = IngestSettings()
    tiered_cache: TieredCacheSettings = msgspec.field(default_factory=TieredCacheSettings)
    scorer: Annotated[str, Meta(description="Scorer used where a query names none.", min_length=1)] = "longest-prefix"
    route: RouteSettings = msgspec.field(default_factory=RouteSettings)
    proxy: ProxySettings = ProxySettings()
    ext_proc: ExtProcSettings = ExtProcSettings()
    models: Annotated[
        Mapping[str, str], Meta(description="Other names of models: alias to the name in the engines' events.")
    ] = msgspec.field(default_factory=dict)
    sources: SourceSettings = SourceSettings()
    log: LogSettings = LogSettings()


def load_config(
    path: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Return the settings of a YAML file, the environment (``KVATLAS_INDEX_MAX_SIZE``) and ``"index.maxSize=5"`` overrides.

    ``environ`` None means the process environment. Reads the token file and checks that TLS files can be read. Raises
    ConfigError, which names the setting, for the first thing that is unknown or wrong.
    """
    tree = read_layers(Config, path, os.environ if environ is None else environ, overrides)
    config = build(Config, tree)
    _check_zmq(config.zmq)
    _check_weights(config.tiered_cache)
    check_keys(config.keys)
    _check_tls("extProc", config.ext_proc)
    return msgspec.structs.replace(config, api=_check_listener("api", config.api), proxy=_check_listener("proxy", config.proxy))


def describe_config() -> list[SettingDoc]:
    """Return path, type, default and documentation of every setting, in the order of this file."""
    return describe(Config)


def _check_zmq(zmq: ZmqSettings) -> None:
    if zmq.reconnect_min > zmq.reconnect_max:
        raise ConfigError("zmq.reconnectMin", f"is more than zmq.reconnectMax ({zmq.reconnect_max:g} s)", "at most that")
    if zmq.endpoint.startswith("tcp:"):
        _check_port("zmq.endpoint", zmq.endpoint, 1)
    for position, engine in enumerate(zmq.engines):
        path = f"zmq.engines[{position}]"
        _check_port(f"{path}.endpoint", engine.endpoint, engine.dp_ranks)
        if engine.replay_endpoint is not None:
            if not re.fullmatch(_TCP, engine.replay_endpoint):
                raise ConfigError(f"{path}.replayEndpoint", f"{engine.replay_endpoint!r} is no address", _TCP_FORM["allowed"])
            _check_port(f"{path}.replayEndpoint", engine.replay_endpoint, engine.dp_ranks)
    if zmq.replay_endpoint is not None:
        _check_template(zmq.replay_endpoint)


def _check_weights(tiers: TieredCacheSettings) -> None:
    for medium in tiers.weights:
        if medium != medium.lower():
            raise ConfigError(f"tieredCache.weights.{medium}", "media are named in lower case", medium.lower())


RANDOM_WITHOUT_SEED = ("xxhash", "xxhash_cbor", "sha256_cbor_64bit")
"""Algorithms whose engines take random bytes where PYTHONHASHSEED is not set."""


def check_keys(keys: KeySettings) -> None:
    """Raise ConfigError where settings of keys contradict each other."""
    engine = keys.engine
    if keys.mode != "engine":
        if engine != EngineHashSettings():
            raise ConfigError("keys.engine", f"is given, but keys.mode is {keys.mode}", "with keys.mode: engine")
        return
    if keys.seed:
        problem = "means nothing where keys are the engines' hashes"
        raise ConfigError("keys.seed", problem, "keys.engine.seed for the engines' PYTHONHASHSEED")
    if engine.seed is None and engine.algorithm in RANDOM_WITHOUT_SEED:
        problem = f"is missing: with {engine.algorithm} and without PYTHONHASHSEED every engine process takes a random seed"
        raise ConfigError("keys.engine.seed", problem, "the PYTHONHASHSEED that all engines are started with; set one")
    for name, value in engine.loras.items():
        path = f"keys.engine.loras.{name}"
        if not name or not value:
            raise ConfigError(path, "name or value is empty", "an adapter's name, and its path as the engine was given it")
        if engine.algorithm == "sha256_cbor_64bit" and not re.fullmatch(r"[0-9]{1,9}", value):
            raise ConfigError(path, f"{value!r:.100} is no number", "the adapter's number (lora_int_id): it is hashed")


def _check_port(path: str, endpoint: str, ranks: int) -> None:
    last = int(endpoint.rpartition(":")[2]) + ranks - 1
    if last > 65535:
        raise ConfigError(path, f"rank {ranks - 1} would be at port {last}", "ports up to 65535")


def _check_template(template: str) -> None:
    allowed = 'an address such as "tcp://{host}:5558"; placeholders {host} and {pod}'
    try:
        used = {name for _, name, spec, conversion in string.Formatter().parse(template) if name is not None}
        plain = template.format(host="10.0.0.7", pod="pod")
    except (ValueError, KeyError, IndexError, AttributeError):
        raise ConfigError("zmq.replayEndpoint", f"{template!r} cannot be filled in", allowed) from None
    if not used <= {"host", "pod"} or not re.fullmatch(_TCP, plain):
        raise ConfigError("zmq.replayEndpoint", f"{template!r} does not make an address", allowed)
    _check_port("zmq.replayEndpoint", plain, 1)


def _check_listener(section: str, settings: L) -> L:
    """Return the settings of a listener with the token in place."""
    _check_tls(section, settings)
    token: Any = settings.token
    if settings.token_file is not None:
        if token is not None:
            raise ConfigError(f"{section}.tokenFile", f"{section}.token is given too", "one of the two")
        token = Secret(_read_file(f"{section}.tokenFile", settings.token_file).strip())
    if token is not None and not re.fullmatch(r"[!-~]{1,4096}", token):
        raise ConfigError(
            f"{section}.token" if settings.token_file is None else f"{section}.tokenFile",
            "the token is empty, too long, or has blanks or special characters",
            "1 to 4096 visible ASCII characters",
        )
    return msgspec.structs.replace(settings, token=token)


def _check_tls(section: str, settings: ApiSettings | ProxySettings | ExtProcSettings) -> None:
    certificate, key = settings.tls_cert_file, settings.tls_key_file
    for name, file, other in (("tlsCertFile", certificate, key), ("tlsKeyFile", key, certificate)):
        if file is not None:
            _read_file(f"{section}.{name}", file)
        elif other is not None:
            both = f"{section}.tlsCertFile and {section}.tlsKeyFile"
            raise ConfigError(f"{section}.{name}", "is missing", f"{both}, both or none")


def _read_file(path: str, file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(path, f"cannot read {file!r}: {reason}", "a readable file") from None
