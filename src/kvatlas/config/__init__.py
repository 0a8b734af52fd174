"""Every setting: what there is (settings), where it comes from (layers), what a value may be (values), units (quantities)."""

from kvatlas.config.quantities import Bytes, Seconds
from kvatlas.config.settings import (
    ApiSettings,
    Config,
    EngineHashSettings,
    EngineSettings,
    IndexSettings,
    IngestSettings,
    KeySettings,
    LogSettings,
    RecordingSettings,
    SourceSettings,
    TieredCacheSettings,
    ZmqSettings,
    check_keys,
    describe_config,
    load_config,
)

__all__ = [
    "ApiSettings",
    "Bytes",
    "Config",
    "EngineHashSettings",
    "EngineSettings",
    "IndexSettings",
    "IngestSettings",
    "KeySettings",
    "LogSettings",
    "RecordingSettings",
    "Seconds",
    "SourceSettings",
    "TieredCacheSettings",
    "ZmqSettings",
    "check_keys",
    "describe_config",
    "load_config",
]
