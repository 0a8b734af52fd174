"""Which stream of events is an endpoint's: what the index calls the KV cache that a request sent there will use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from kvatlas.index import Index
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.types import PodId, Stream, StreamInfo

LOOK_EVERY_S = 1.0


class StreamNames:
    """The names under which events may speak of an endpoint, likeliest first, each with the endpoint's rank.

    First its pod's name as the pool has it. Then what else events are published under: ``namespace/name``, the name alone,
    ``ip:port``, the bare address. Such a name counts only if it means one pod of the pool: not a bare address that two engines
    share, and not a name that is in two namespaces.
    """

    def __init__(self) -> None:
        self._streams: dict[EndpointName, tuple[Stream, ...]] = {}

    def pool_changed(self, endpoints: Sequence[Endpoint]) -> None:
        pods_by_alias: defaultdict[str, set[PodId]] = defaultdict(set)
        for endpoint in endpoints:
            for alias in (endpoint.pod, *_aliases(endpoint)):
                pods_by_alias[alias].add(endpoint.pod)
        self._streams = {}
        for endpoint in endpoints:
            meant = [alias for alias in _aliases(endpoint) if len(pods_by_alias[alias]) == 1]
            pods = dict.fromkeys([endpoint.pod, *map(PodId, meant)])
            self._streams[endpoint.name] = tuple(Stream(pod, endpoint.dp_rank) for pod in pods)

    def of(self, endpoint: Endpoint) -> tuple[Stream, ...]:
        """Return an endpoint's possible streams; of one that is not in the pool, that of its pod's name."""
        return self._streams.get(endpoint.name) or (endpoint.stream,)


def _aliases(endpoint: Endpoint) -> tuple[str, ...]:
    name = endpoint.name.partition("#")[0]
    return name, name.rpartition("/")[2], endpoint.authority, f"{endpoint.address}:{endpoint.port}", endpoint.address


class KnownStreams:
    """The streams that the index has heard of, looked at once a second at most: it costs every stream."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._looked_s: float | None = None
        self._streams: Mapping[Stream, StreamInfo] = {}

    def first(self, streams: Sequence[Stream], now_s: float) -> StreamInfo | None:
        """Return what is known of the first of ``streams`` that anything was heard of."""
        if self._looked_s is None or now_s - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now_s
            self._streams = self._index.streams()
        return next((self._streams[stream] for stream in streams if stream in self._streams), None)
