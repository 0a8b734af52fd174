"""Every setting (settings, tokens): where it comes from (layers), what it may be (values, kinds), units (quantities)."""

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
from kvatlas.config.tokens import PrefixStoreSettings, RendererSettings, TokenServiceSettings, TokenSettings

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
    "PrefixStoreSettings",
    "RecordingSettings",
    "RendererSettings",
    "Seconds",
    "SourceSettings",
    "TieredCacheSettings",
    "TokenServiceSettings",
    "TokenSettings",
    "ZmqSettings",
    "check_keys",
    "describe_config",
    "load_config",
]
