"""What ``kvatlas simulate --list`` shows."""

from __future__ import annotations

from msgspec import inspect
from rich.text import Text

from kvatlas.cli.screen import screen, table
from kvatlas.sim.policies import POLICIES
from kvatlas.sim.presets import PRESETS
from kvatlas.sim.workloads.catalog import KINDS

POLICY_LINES = {
    "random": "anyone",
    "round-robin": "one after the other",
    "least-load": "whoever has the fewest requests in flight",
    "power-of-two": "the less loaded of two at random",
    "sglang-cache-aware": "SGLang's cache_aware: its tree of what it routed, unless loads are too uneven",
    "dynamo": "NVIDIA Dynamo's cost function: blocks to compute plus blocks in use",
    "llm-d-default": "llm-d as it is by default: approximate prefix cache 3, queue 2, KV use 2",
    "llm-d-precise": "llm-d with precise prefix caching from events: prefix 3, queue 2, KV use 2",
    "llm-d-load": "llm-d by load alone: queue and KV use",
    "llm-d-random": "llm-d's random picker",
    "kvatlas": "ours: the expected time to first token, from events and routing history",
    "kvatlas-approximate": "ours without events: from routing history alone",
}
"""Names that policies have, and what they go by."""


def show_list() -> None:
    """Print workloads with their parameters, policies and presets."""
    console = screen()
    workloads = table("Workloads (--workload), and what --set and --sweep take", "name", "what it is", whole=("name",))
    for name, kind in KINDS.items():
        workloads.add_row(Text(name, "bold"), kind.what)
        for parameter, default, what in parameters(name):
            workloads.add_row(Text(f"  {parameter}", "dim"), Text(f"{what}{f'  [{default}]' if default else ''}", "dim"))
    policies = table("Policies (--policy)", "name", "what it is", whole=("name",))
    for name in POLICIES:
        policies.add_row(Text(name, "bold"), POLICY_LINES.get(name, ""))
    presets = table("Presets (--preset)", "name", "what it is", whole=("name",))
    for name, preset in PRESETS.items():
        presets.add_row(Text(name, "bold"), preset.what)
    for one in (workloads, policies, presets):
        console.print(one)


def parameters(workload: str) -> list[tuple[str, str, str]]:
    """Return a workload's parameters: name, default (empty: none, or it must be given), what it is."""
    info = inspect.type_info(KINDS[workload].parameters)
    assert isinstance(info, inspect.StructType)
    found = []
    for field in info.fields:
        extra = field.type.extra_json_schema if isinstance(field.type, inspect.Metadata) else None
        default = "" if field.required or field.default in (None, "") else str(field.default)
        found.append((field.name, default, (extra or {}).get("description", "")))
    return found
