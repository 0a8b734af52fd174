"""From Kubernetes objects, as its API server sends them, to endpoints. No IO."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from kvatlas.discovery.endpoints import engine_of_labels
from kvatlas.netloc import netloc
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.types import PodId

Object = Mapping[str, Any]


class PoolSpec(msgspec.Struct, frozen=True):
    """Which pods are in an InferencePool, and on which ports they serve."""

    selector: str
    """As a label selector: ``app=llama,tier=gpu``."""
    ports: tuple[int, ...]


class BadObjectError(Exception):
    """An object is not what its kind should be."""


def pool_spec(pool: Object) -> PoolSpec:
    """Return an InferencePool's selection. Raises BadObjectError.

    Source: Gateway API inference extension, v1 (``selector.matchLabels``, ``targetPorts``) and v1alpha2 (``selector``,
    ``targetPortNumber``).
    """
    try:
        spec = pool["spec"]
        labels = spec["selector"].get("matchLabels", spec["selector"])
        ports = [port["number"] for port in spec["targetPorts"]] if "targetPorts" in spec else [spec["targetPortNumber"]]
        if not labels or not all(isinstance(port, int) for port in ports):
            raise BadObjectError("the InferencePool has no labels to select by, or a port that is no number")
        return PoolSpec(",".join(f"{name}={value}" for name, value in sorted(labels.items())), tuple(ports))
    except (KeyError, TypeError, AttributeError) as error:
        raise BadObjectError(f"the InferencePool has no {error}") from None


def endpoints_of_pods(pods: Iterable[Object], ports: Sequence[int], events_name: str) -> list[Endpoint]:
    """Return one endpoint for each port of each pod that is ready.

    Names are those that llm-d gives: ``namespace/pod-rank-N``, by the port's place. Sorted, so that equal pods make an equal
    list.
    """
    found = [_endpoint(pod, place, port, events_name) for pod in pods if is_ready(pod) for place, port in enumerate(ports)]
    return sorted(found, key=lambda endpoint: endpoint.name)


def is_ready(pod: Object) -> bool:
    """Whether a pod serves: ready, with an address, and not being deleted. What can't be read is not ready."""
    try:
        conditions = pod["status"].get("conditions") or ()
        return (
            "deletionTimestamp" not in pod["metadata"]
            and bool(pod["status"].get("podIP"))
            and any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
        )
    except (KeyError, TypeError, AttributeError):
        return False


def _endpoint(pod: Object, place: int, port: int, events_name: str) -> Endpoint:
    metadata = pod["metadata"]
    address = pod["status"]["podIP"]
    names = {"ip:port": netloc(address, port), "ip": address, "name": metadata["name"]}
    labels = metadata.get("labels") or {}
    return Endpoint(
        name=EndpointName(f"{metadata.get('namespace', 'default')}/{metadata['name']}-rank-{place}"),
        address=address,
        port=port,
        labels=labels,
        pod=PodId(names[events_name]),
        engine=engine_of_labels(labels),
    )
