"""Settings of routing: who is there, how engines are asked for their load, when one is left alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvatlas.config.kinds import Capacity, Limit, Wait
from kvatlas.config.layers import Secret
from kvatlas.config.quantities import Bytes, Seconds

_NAME = Meta(pattern=r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", extra={"allowed": "a name as Kubernetes has them"})


_PeerAddress = Annotated[
    str,
    Meta(
        pattern=r"tcp://(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):[0-9]{1,5}|ipc://\S{1,100}",
        extra={"allowed": 'an address such as "tcp://10.0.0.7:5580" or "ipc:///run/kvatlas/0"'},
    ),
]


class KubernetesSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Endpoints from pods: those of an InferencePool, or those with given labels."""

    pool: Annotated[Annotated[str, _NAME] | None, Meta(description="An InferencePool's name.")] = None
    selector: Annotated[
        str | None, Meta(description="A label selector instead of a pool, such as app=llama; needs targetPorts.")
    ] = None
    target_ports: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=65535)], ...],
        Meta(description="Ports of each pod; every one is an endpoint. With a pool: instead of the pool's."),
    ] = ()
    namespace: Annotated[
        Annotated[str, _NAME] | None, Meta(description="By default the one that kvatlas runs in, or that the kubeconfig names.")
    ] = None
    kubeconfig: Annotated[
        str | None, Meta(description="Outside of a cluster: the kubeconfig file. By default $KUBECONFIG or ~/.kube/config.")
    ] = None
    events_name: Annotated[
        Literal["ip:port", "ip", "name"],
        Meta(description="What engines call their pod in KV events (kv@POD@MODEL): ip:port, ip, or the pod's name."),
    ] = "ip:port"
    retry_max: Annotated[Wait, Meta(description="Longest wait before the API server is asked again after a failure.")] = (
        Seconds(30)
    )


class PollSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Polls of engines' metrics."""

    interval: Annotated[
        Wait, Meta(description="Time between two polls of an engine; more where it is slow: half of the time it is left alone.")
    ] = Seconds(0.05)
    timeout: Annotated[Wait, Meta(description="Longest time to connect, and as long again for the answer.")] = Seconds(1)
    backoff_max: Annotated[Wait, Meta(description="Longest wait between polls of an engine that does not answer.")] = Seconds(5)
    at_once_max: Annotated[Limit, Meta(description="Polls in progress; further ones wait.")] = 64
    page_bytes_max: Annotated[Capacity, Meta(description="A longer answer makes no report.")] = Bytes(4 << 20)


class HealthSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """When an endpoint gets no requests."""

    failures_max: Annotated[Limit, Meta(description="Requests that fail in a row and take an endpoint out.")] = 3
    retry_after: Annotated[Wait, Meta(description="How long it gets none, before one request may try.")] = Seconds(5)
    polls_failed_max: Annotated[
        Limit, Meta(description="Polls in a row that find nobody and take it out, until one is answered.")
    ] = 5


class RouteSettings(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Routing: where requests go."""

    front_doors: Annotated[
        tuple[Literal["proxy", "ext-proc"], ...],
        Meta(
            description=(
                "How requests come in. proxy: an OpenAI-compatible reverse proxy. ext-proc: an endpoint picker for Envoy. "
                "None: nothing is routed. `kvatlas route` opens the proxy where none is named."
            )
        ),
    ] = ()
    picker_config: Annotated[
        str | None,
        Meta(
            description="An EndpointPickerConfig file, as for llm-d's router; by default requests go by expected TTFT.",
            min_length=1,
        ),
    ] = None
    tokens_timeout: Annotated[
        Wait,
        Meta(description="How long a request's tokens may take; without them it is routed by its text's history and load."),
    ] = Seconds(0.4)
    objectives: Annotated[
        Mapping[str, int],
        Meta(description="Priorities by objective (header x-llm-d-inference-objective); below 0: may be shed. Others have 0."),
    ] = msgspec.field(default_factory=dict)
    decisions_kept: Annotated[Limit, Meta(description="Decisions kept for `kvatlas explain` and /v1/decisions.")] = 1000
    decision_log: Annotated[bool, Meta(description="Write a log line for each request that ended: where it went, and why.")] = (
        False
    )
    workers: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="Processes that share the proxy's port; each has an index of its own, and an API at the next port.",
        ),
    ] = 1
    peers: Annotated[
        tuple[_PeerAddress, ...],
        Meta(
            description=(
                "Other routers of the same engines, where they listen (peersListen): what they have in flight, and which "
                "prompts they sent where, counts here too. Of a name all addresses are taken."
            )
        ),
    ] = ()
    peers_listen: Annotated[
        tuple[_PeerAddress, ...], Meta(description="Where other routers hear what this one does, such as tcp://*:5580.")
    ] = ()
    peers_token: Annotated[
        Secret | None,
        Meta(description="Encrypts what routers tell each other; all need the same.", min_length=16),
    ] = None
    peers_silence: Annotated[
        Annotated[Seconds, Meta(ge=2)],
        Meta(description="After so long without a word a peer is taken to have nothing in flight."),
    ] = Seconds(5)
    orca: Annotated[
        bool,
        Meta(
            description=(
                "Ask engines to tell their load with each answer (ORCA headers). vLLM collects all its metrics and writes a "
                "log line each time, and tells nothing with streams: of use where polls are slow or impossible."
            )
        ),
    ] = False
    endpoints: Annotated[
        tuple[str, ...],
        Meta(
            description="Engines by URL, such as http://10.0.0.7:8000; with ?pod=llama-0&dpRanks=2&engine=sglang where needed.",
            extra={"allowed": 'URLs such as "http://10.0.0.7:8000"'},
        ),
    ] = ()
    endpoints_file: Annotated[
        str | None, Meta(description="A file that lists engines, as for llm-d's file-discovery.", min_length=1)
    ] = None
    watch_file: Annotated[bool, Meta(description="Follow changes of that file.")] = True
    watch_interval: Annotated[Wait, Meta(description="How often it is looked at.")] = Seconds(1)
    kubernetes: KubernetesSettings = KubernetesSettings()
    polls: PollSettings = PollSettings()
    health: HealthSettings = HealthSettings()

    @property
    def endpoint_sources(self) -> tuple[str, ...]:
        """The settings that say where endpoints come from."""
        cluster = self.kubernetes.pool is not None or self.kubernetes.selector is not None
        given = {
            "route.endpoints": bool(self.endpoints),
            "route.endpointsFile": self.endpoints_file is not None,
            "route.kubernetes": cluster,
        }
        return tuple(name for name, is_given in given.items() if is_given)
