"""Where llm-d reads engines' state and finds endpoints. Source: llm-d-router, ``framework/plugins/datalayer``."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from kvatlas.route.endpoint import ENGINE_LABEL
from kvatlas.route.inert.plugin import Inert
from kvatlas.route.parameters import GoDuration

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class HttpSourceParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A page of every endpoint that is read again and again."""

    scheme: Literal["http", "https"] = "http"
    path: str = "/metrics"
    insecure_skip_verify: bool = True
    ca_cert_path: str = msgspec.field(default="", name="caCertPath")
    client_cert_path: str = ""
    client_key_path: str = ""
    interval: GoDuration | None = None
    """Seconds between two reads. None: as often as the router is told to."""


class MetricsDataSource(Inert):
    """Reads engines' metrics pages."""

    class Parameters(HttpSourceParameters, frozen=True, forbid_unknown_fields=True, rename="camel"):
        port: Port | None = None
        """None: the port that requests go to."""

    adopted = frozenset({"interval"})
    done_by = "the poller of engines' metrics (kvatlas.discovery)"


class CoreMetricsExtractor(Inert):
    """Finds load, cache sizes and adapters in a metrics page."""

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        engine_label_key: str = ENGINE_LABEL
        default_engine: str = "vllm"
        engine_configs: tuple[EngineMetrics, ...] = ()

    done_by = "the readers of vLLM's and SGLang's metrics (kvatlas.discovery)"


class CustomMetric(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    attribute_key: str
    metric_spec: str


class EngineMetrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How one kind of engine names its metrics: ``name{label=value}``; empty: it has none."""

    name: str
    queued_requests_spec: str = msgspec.field(default="", name="queuedRequestsSpec")
    running_requests_spec: str = msgspec.field(default="", name="runningRequestsSpec")
    kv_usage_spec: str = msgspec.field(default="", name="kvUsageSpec")
    lora_spec: str = msgspec.field(default="", name="loraSpec")
    cache_info_spec: str = msgspec.field(default="", name="cacheInfoSpec")
    cache_block_size_label_name: str = msgspec.field(default="", name="cacheBlockSizeLabelName")
    cache_num_blocks_label_name: str = msgspec.field(default="", name="cacheNumBlocksLabelName")
    cache_block_size_spec: str = msgspec.field(default="", name="cacheBlockSizeSpec")
    cache_num_blocks_spec: str = msgspec.field(default="", name="cacheNumBlocksSpec")
    custom_metrics: tuple[CustomMetric, ...] = msgspec.field(default=(), name="customMetrics")


class EndpointNotificationSource(Inert):
    """Tells who came and who went."""

    done_by = "the router's pool: every plugin that watches it is told (PoolObserver)"


class K8sNotificationSource(Inert):
    """Tells of changed Kubernetes objects."""

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        group: str = ""
        version: str = ""
        kind: str = ""

    done_by = "nobody: no plugin here reads Kubernetes objects of other kinds"


class ModelsDataSource(Inert):
    """Reads ``/v1/models`` of every endpoint."""

    class Parameters(HttpSourceParameters, frozen=True, forbid_unknown_fields=True, rename="camel"):
        path: str = "/v1/models"

    done_by = "nobody: no plugin here goes by an endpoint's list of models"


class ModelsDataExtractor(Inert):
    """Finds models in that page."""

    done_by = ModelsDataSource.done_by


class FileDiscovery(Inert):
    """Finds endpoints in a file."""

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        path: Annotated[str, msgspec.Meta(min_length=1)]
        watch_file: bool = False

    adopted = frozenset({"path", "watchFile"})
    done_by = "kvatlas.discovery, which reads the same file"
