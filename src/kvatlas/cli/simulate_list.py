"""What ``kvatlas simulate --list`` shows."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import inspect
from rich.table import Table
from rich.text import Text

from kvatlas.cli.screen import screen, table
from kvatlas.sim.policies import POLICIES
from kvatlas.sim.presets import PRESETS, Preset
from kvatlas.sim.workloads.catalog import KINDS, kind_of_file

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


def show_list(workload: str | None) -> None:
    """Print workloads, policies and presets; of a workload that is named, its parameters."""
    console = screen()
    if workload is not None:
        console.print(_parameters(workload))
        return
    console.print(_named("Workloads (--workload)", {name: kind.what for name, kind in KINDS.items()}))
    console.print(_named("Policies (--policy)", {name: POLICY_LINES[name] for name in POLICIES}))
    console.print(_named("Presets (--preset)", {name: _engine(preset) for name, preset in PRESETS.items()}))


def _engine(preset: Preset) -> str:
    spec = preset.spec
    return f"{preset.model} on {preset.gpus}: {spec.gpu_blocks * spec.block_size_tokens:,} tokens of KV cache"


def _named(title: str, lines: Mapping[str, str]) -> Table:
    shown = table(title, "name", "what it is", whole=("name",))
    for name, what in lines.items():
        shown.add_row(Text(name, "bold"), what)
    return shown


def _parameters(workload: str) -> Table:
    kind = workload if workload in KINDS else kind_of_file(workload)
    shown = table(f"{kind}: {KINDS[kind].what}", "--set, --sweep", "default", "what it is", whole=("--set, --sweep",))
    for name, default, what in parameters(kind):
        shown.add_row(Text(name, "bold"), default, what)
    return shown


def parameters(kind: str) -> list[tuple[str, str, str]]:
    """Return a workload's parameters: name, default (empty: none, or it must be given), what it is."""
    info = inspect.type_info(KINDS[kind].parameters)
    assert isinstance(info, inspect.StructType)
    found = []
    for field in info.fields:
        extra = field.type.extra_json_schema if isinstance(field.type, inspect.Metadata) else None
        absent = field.required or field.default in (None, "")
        default = "" if absent else f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
        found.append((field.name, default, (extra or {}).get("description", "")))
    return found
