"""Who a request can be sent to: one HTTP address of an engine, or one data-parallel rank behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NewType

import msgspec

from kvatlas.netloc import netloc
from kvatlas.types import DpRank, PodId, Stream

EndpointName = NewType("EndpointName", str)
"""Unique in a pool: ``namespace/name``, and ``#dpN`` behind it where a rank is a target of its own."""

ROLE_LABEL = "llm-d.ai/role"
ENGINE_LABEL = "llm-d.ai/engine-type"


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One target. Equal names are the same target, whatever else has changed."""

    name: EndpointName
    address: str
    """IPv4, IPv6 (without brackets) or a host's name."""
    port: int
    labels: Mapping[str, str] = {}
    pod: PodId
    """Its name in the engines' events: what the index knows it by."""
    dp_rank: DpRank = DpRank(0)
    names_rank: bool = False
    """Several ranks share the address: requests name theirs in the header ``X-data-parallel-rank``."""
    engine: Literal["vllm", "sglang"] = "vllm"
    tls: bool = False
    metrics_host: str | None = None
    """``host:port`` of its metrics, where that is another than of its requests."""

    @property
    def authority(self) -> str:
        """``ip:port``, as the headers of the endpoint-picker protocol have it."""
        return netloc(self.address, self.port)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}"

    @property
    def metrics_url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.metrics_host or self.authority}/metrics"

    @property
    def stream(self) -> Stream:
        """The KV cache that a request sent here will use."""
        return Stream(self.pod, self.dp_rank)
