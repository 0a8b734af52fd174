"""EndpointPickerConfigs as they are found in the wild."""

from __future__ import annotations

PRECISE = """
plugins:
- {type: token-producer, parameters: {modelName: M, vllm: {url: "http://localhost:8000"}}}
- {type: endpoint-notification-source}
- {type: metrics-data-source}
- {type: core-metrics-extractor}
- {type: single-profile-handler}
- {type: decode-filter}
- {type: precise-prefix-cache-producer, parameters: {tokenProcessorConfig: {blockSize: 64}, indexerConfig: {kvBlockIndexConfig: {enableMetrics: true}}}}
- {type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: precise-prefix-cache-producer}}
- {type: kv-cache-utilization-scorer}
- {type: queue-scorer}
- {type: max-score-picker}
dataLayer: {sources: [{pluginRef: metrics-data-source, extractors: [{pluginRef: core-metrics-extractor}]}, {pluginRef: endpoint-notification-source, extractors: [{pluginRef: precise-prefix-cache-producer}]}]}
schedulingProfiles: [{name: default, plugins: [{pluginRef: decode-filter}, {pluginRef: prefix-cache-scorer, weight: 2.0}, {pluginRef: kv-cache-utilization-scorer, weight: 1.0}, {pluginRef: queue-scorer, weight: 1.0}, {pluginRef: max-score-picker}]}]
"""  # noqa: E501  as it is in the wild

DISAGGREGATED = """
plugins:
- {type: approx-prefix-cache-producer, parameters: {maxPrefixTokensToMatch: 16384, lruCapacityPerServer: 31250}}
- {type: prefix-cache-scorer}
- {type: queue-scorer}
- {type: prefill-filter}
- {type: decode-filter}
- {type: max-score-picker}
- {type: disagg-profile-handler, parameters: {deciders: {prefill: prefix-based-pd-decider}}}
- {type: prefix-based-pd-decider, parameters: {nonCachedTokens: 16}}
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}, {pluginRef: max-score-picker}, {pluginRef: prefix-cache-scorer, weight: 2}, {pluginRef: queue-scorer, weight: 1}]}
- {name: decode, plugins: [{pluginRef: decode-filter}, {pluginRef: max-score-picker}, {pluginRef: prefix-cache-scorer, weight: 2}, {pluginRef: queue-scorer, weight: 1}]}
"""  # noqa: E501

KSERVE = """
plugins:
- {type: single-profile-handler}
- {type: prefix-cache-scorer, parameters: {mode: cache_tracking, tokenProcessorConfig: {blockSize: 64, hashSeed: "42"}, indexerConfig: {kvBlockIndexConfig: {enableMetrics: true, metricsLoggingInterval: 60000000000}}}}
- {type: load-aware-scorer}
- {type: max-score-picker}
schedulingProfiles: [{name: default, plugins: [{pluginRef: prefix-cache-scorer, weight: 2.0}, {pluginRef: load-aware-scorer, weight: 1.0}, {pluginRef: max-score-picker}]}]
"""  # noqa: E501
