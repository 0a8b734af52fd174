"""From what people write to endpoints: URLs, and llm-d's endpoints file with a few fields of our own. No IO."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta

from kvatlas.config import EngineSettings
from kvatlas.config.layers import build, parse_yaml
from kvatlas.errors import ConfigError
from kvatlas.netloc import netloc
from kvatlas.route.endpoint import ENGINE_LABEL, Endpoint, EndpointName
from kvatlas.types import DpRank, PodId

FILE_BYTES_MAX = 1 << 20
"""Source: llm-d-router, file-discovery."""

ENDPOINTS_MAX = 10_000
"""Each is polled, and a candidate of every decision."""

PORT_MAX = 65535

EngineName = Literal["vllm", "sglang"]

_HOST = r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?|[0-9a-fA-F:.]*:[0-9a-fA-F:.]*"
_TCP = r"tcp://(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):[0-9]{1,5}"
_TCP_FORM = {"allowed": 'an address such as "tcp://10.0.0.7:5557"'}


class KvEvents(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Where a worker publishes its KV events."""

    endpoint: Annotated[str, Meta(pattern=_TCP, extra=_TCP_FORM)]
    replay_endpoint: Annotated[str, Meta(pattern=_TCP, extra=_TCP_FORM)] | None = None
    model: str | None = None
    decoder: str | None = None


class EndpointEntry(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """One worker as the file describes it. Source: llm-d-router, file-discovery; from ``pod`` on the fields are our own."""

    name: Annotated[str, Meta(pattern=r"[^\s/#]{1,253}", extra={"allowed": "text without spaces, / and #"})]
    namespace: Annotated[str, Meta(pattern=r"[^\s/#]{1,253}", extra={"allowed": "text without spaces, / and #"})] = "default"
    address: Annotated[str, Meta(pattern=_HOST, extra={"allowed": 'an address such as "10.0.0.7", or a host\'s name'})]
    port: Annotated[str, Meta(pattern=r"0*[1-9][0-9]{0,4}", extra={"allowed": '"1" to "65535"'})]
    metrics_host: Annotated[str, Meta(pattern=r"\S+:[0-9]{1,5}", extra={"allowed": '"host:port"'})] | None = None
    labels: Mapping[str, str] = {}
    pod: Annotated[str, Meta(min_length=1)] | None = None
    dp_ranks: Annotated[int, Meta(ge=1, le=1024)] = 1
    engine: EngineName | None = None
    tls: bool = False
    kv_events: KvEvents | None = None


class Pool(msgspec.Struct, frozen=True):
    """What a description comes to."""

    endpoints: tuple[Endpoint, ...]
    engines: tuple[EngineSettings, ...] = ()
    """Whose KV events to subscribe to."""


def pool_from_file(content: bytes, source: str) -> Pool:
    """Return what an endpoints file (YAML or JSON) describes. ConfigError names entry and field.

    Stricter than llm-d: a file with one bad entry, an unknown field or a doubled name is refused as a whole.
    """
    if len(content) > FILE_BYTES_MAX:
        raise ConfigError(source, f"is larger than {FILE_BYTES_MAX} bytes", "an endpoints file of at most 1 MiB")
    try:
        tree = parse_yaml(content.decode("utf-8"), source)
    except UnicodeDecodeError as error:
        raise ConfigError(source, f"is not UTF-8 at byte {error.start}", "YAML or JSON in UTF-8") from None
    if not isinstance(tree, dict) or not isinstance(items := tree.get("endpoints"), list) or len(tree) > 1:
        raise ConfigError(source, "is no endpoints file", "one list at its top: endpoints: [{name, address, port}, ...]")
    return make_pool((_entry_of(item, f"{source}: endpoints[{place}]") for place, item in enumerate(items)), source)


def pool_from_urls(urls: Iterable[str], source: str = "urls") -> Pool:
    """Return what URLs describe: ``http://10.0.0.7:8000``, with the fields of an entry as a query where they are needed.

    ``http://10.0.0.7:8000?pod=llama-0&dpRanks=2&engine=sglang``; other names than fields are labels, and ``kvEvents``,
    ``replayEndpoint`` and ``model`` are those of the worker's events. The endpoint is named after its address.
    """
    return make_pool((_entry_of_url(url, f"{source}[{place}]") for place, url in enumerate(urls)), source)


def make_pool(entries: Iterable[EndpointEntry], source: str) -> Pool:
    """Return the endpoints of entries. ConfigError where a name is doubled or there are too many."""
    endpoints: dict[EndpointName, Endpoint] = {}
    engines = []
    for entry in entries:
        for endpoint in endpoints_of(entry):
            if endpoint.name in endpoints:
                raise ConfigError(source, f"two endpoints are called {endpoint.name}", "a name of its own for each")
            endpoints[endpoint.name] = endpoint
        if len(endpoints) > ENDPOINTS_MAX:
            raise ConfigError(source, f"describes more than {ENDPOINTS_MAX} endpoints", "fewer")
        if entry.kv_events is not None:
            engines.append(_engine_of(entry, entry.kv_events))
    return Pool(tuple(endpoints.values()), tuple(engines))


def endpoints_of(entry: EndpointEntry) -> list[Endpoint]:
    """Return an entry's endpoint, or one for each data-parallel rank behind its address."""
    endpoint = Endpoint(
        name=EndpointName(f"{entry.namespace}/{entry.name}"),
        address=entry.address,
        port=int(entry.port),
        labels=entry.labels,
        pod=_pod_of(entry),
        engine=entry.engine or engine_of_labels(entry.labels),
        tls=entry.tls,
        metrics_host=entry.metrics_host,
    )
    if entry.dp_ranks == 1:
        return [endpoint]
    return [
        msgspec.structs.replace(endpoint, name=EndpointName(f"{endpoint.name}#dp{rank}"), dp_rank=DpRank(rank), names_rank=True)
        for rank in range(entry.dp_ranks)
    ]


def engine_of_labels(labels: Mapping[str, str]) -> EngineName:
    """Return the engine that labels name; vLLM where they name none, or one that is not known here."""
    return "sglang" if labels.get(ENGINE_LABEL) == "sglang" else "vllm"


def _pod_of(entry: EndpointEntry) -> PodId:
    """Return the name in events: ``ip:port`` by the convention of vLLM's topics, unless the entry says otherwise."""
    return PodId(entry.pod or netloc(entry.address, int(entry.port)))


def _engine_of(entry: EndpointEntry, events: KvEvents) -> EngineSettings:
    return EngineSettings(
        endpoint=events.endpoint,
        replay_endpoint=events.replay_endpoint,
        pod=_pod_of(entry),
        model=events.model,
        dp_ranks=entry.dp_ranks,
        decoder=events.decoder or entry.engine or engine_of_labels(entry.labels),
    )


def _entry_of(item: Any, path: str) -> EndpointEntry:
    if not isinstance(item, Mapping):
        raise ConfigError(path, f"{item!r:.60} is no endpoint", "such as {name: llama-0, address: 10.0.0.7, port: 8000}")
    if isinstance(name := item.get("name"), str):
        path = f"{path} ({name:.80})"
    given = dict(item)
    if isinstance(port := given.get("port"), int) and not isinstance(port, bool):
        given["port"] = str(port)
    entry = build(EndpointEntry, given, path)
    if int(entry.port) > PORT_MAX:
        raise ConfigError(f"{path}.port", f"{entry.port} is no port", f'"1" to "{PORT_MAX}"')
    if entry.kv_events is not None:
        for field, address in (("endpoint", entry.kv_events.endpoint), ("replayEndpoint", entry.kv_events.replay_endpoint)):
            last = 0 if address is None else int(address.rpartition(":")[2]) + entry.dp_ranks - 1
            if last > PORT_MAX:
                raise ConfigError(f"{path}.kvEvents.{field}", f"rank r is at port + r, here {last}", f"ports up to {PORT_MAX}")
    return entry


_ENTRY_FIELDS = frozenset({"name", "namespace", "metricsHost", "pod", "engine"})
_RANKS_FIELD = "dpRanks"
_EVENT_FIELDS = {"kvEvents": "endpoint", "replayEndpoint": "replayEndpoint", "model": "model", "decoder": "decoder"}


def _plain(name: str) -> str:
    """Return a name without what people write differently: capitals, dashes, a plural."""
    return name.lower().replace("-", "").replace("_", "").removesuffix("s")


_FIELD_MEANT = {_plain(name): name for name in (*_ENTRY_FIELDS, *_EVENT_FIELDS, _RANKS_FIELD)}
"""What is nearly a field is none of the worker's labels: as such it would be without effect, and nobody would know."""


def _entry_of_url(url: str, path: str) -> EndpointEntry:
    allowed = 'a URL such as "http://10.0.0.7:8000" or "http://10.0.0.7:8000?pod=llama-0"'
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        options = urllib.parse.parse_qsl(
            parts.query, keep_blank_values=True, strict_parsing=bool(parts.query), max_num_fields=32
        )
    except ValueError as error:
        raise ConfigError(path, f"{url!r:.80}: {error}", allowed) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(path, f"{url!r:.80} is no URL of an engine", allowed)
    if parts.path not in ("", "/") or parts.fragment or parts.username is not None:
        raise ConfigError(path, f"{url!r:.80} has more than an address", allowed)
    entry: dict[str, Any] = {
        "name": netloc(parts.hostname, port),
        "address": parts.hostname,
        "port": port,
        "tls": parts.scheme == "https",
    }
    events: dict[str, str] = {}
    for name, value in options:
        if name in _ENTRY_FIELDS:
            entry[name] = value
        elif name in _EVENT_FIELDS:
            events[_EVENT_FIELDS[name]] = value
        elif name == _RANKS_FIELD:
            entry[name] = int(value) if value.isdecimal() else value
        elif (meant := _FIELD_MEANT.get(_plain(name))) is not None:
            allowed = f"{meant}; a label that is called otherwise"
            raise ConfigError(path, f"{name!r:.80} is no field; did you mean {meant!r}?", allowed)
        else:
            cast(dict[str, str], entry.setdefault("labels", {}))[name] = value
    if events:
        entry["kvEvents"] = events
    return _entry_of(entry, path)
