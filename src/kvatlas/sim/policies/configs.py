"""Policies that are an EndpointPickerConfig, run by the project's own router.

llm-d's are what its documentation and its published benchmark name; weights are those of llm-d-router's default
(queue 2, KV 2, prefix 3).
"""

from __future__ import annotations

from kvatlas.serve.routing.picker import OURS

_HEAD = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
"""

LLMD_DEFAULT = ""
"""No configuration at all: approx-prefix-cache-producer, and the weights above."""

LLMD_PRECISE = f"""{_HEAD}
plugins:
- {{type: precise-prefix-cache-producer}}
- {{type: prefix-cache-scorer, parameters: {{prefixMatchInfoProducerName: precise-prefix-cache-producer}}}}
- {{type: queue-scorer}}
- {{type: kv-cache-utilization-scorer}}
schedulingProfiles:
- name: default
  plugins:
  - {{pluginRef: prefix-cache-scorer, weight: 3}}
  - {{pluginRef: queue-scorer, weight: 2}}
  - {{pluginRef: kv-cache-utilization-scorer, weight: 2}}
"""

LLMD_LOAD = f"""{_HEAD}
plugins:
- {{type: queue-scorer}}
- {{type: kv-cache-utilization-scorer}}
schedulingProfiles:
- {{name: default, plugins: [{{pluginRef: queue-scorer, weight: 2}}, {{pluginRef: kv-cache-utilization-scorer, weight: 2}}]}}
"""

LLMD_RANDOM = f"""{_HEAD}
plugins:
- {{type: random-picker}}
schedulingProfiles:
- {{name: default, plugins: [{{pluginRef: random-picker}}]}}
"""

KVATLAS_APPROXIMATE = OURS.replace("blended-prefix-cache-producer", "approx-prefix-cache-producer")
"""Our default where no events are to be had."""

CONFIGS = {
    "llm-d-default": LLMD_DEFAULT,
    "llm-d-precise": LLMD_PRECISE,
    "llm-d-load": LLMD_LOAD,
    "llm-d-random": LLMD_RANDOM,
    "kvatlas": OURS,
    "kvatlas-approximate": KVATLAS_APPROXIMATE,
}
