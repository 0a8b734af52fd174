"""Every setting: what there is (settings), where it comes from (layers), what a value may be (values), units (quantities)."""

from kvatlas.config.quantities import Bytes, Seconds
from kvatlas.config.settings import (
    ApiSettings,
    Config,
    EngineSettings,
    IndexSettings,
    IngestSettings,
    KeySettings,
    LogSettings,
    PrefixStoreSettings,
    RecordingSettings,
    RendererSettings,
    SourceSettings,
    TieredCacheSettings,
    TokenServiceSettings,
    TokenSettings,
    ZmqSettings,
    describe_config,
    load_config,
)

__all__ = [
    "ApiSettings",
    "Bytes",
    "Config",
    "EngineSettings",
    "IndexSettings",
    "IngestSettings",
    "KeySettings",
    "LogSettings",
    "PrefixStoreSettings",
    "RecordingSettings",
    "RendererSettings",
    "Seconds",
    "SourceSettings",
    "TieredCacheSettings",
    "TokenServiceSettings",
    "TokenSettings",
    "ZmqSettings",
    "describe_config",
    "load_config",
]
