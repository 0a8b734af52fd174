"""All workloads by name, and traces by their files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kvatlas.errors import ConfigError, RequestError
from kvatlas.route.parameters import read_parameters, unknown_name
from kvatlas.sim.workloads import agents, bursts, chats, mooncake, no_reuse, shared_prefix, text_trace
from kvatlas.sim.workloads.limited import Limited
from kvatlas.sim.workloads.trace_lines import numbered
from kvatlas.sim.workloads.workload import Workload


class Kind(NamedTuple):
    """One workload that there is."""

    what: str
    """In one line."""
    parameters: type[msgspec.Struct]
    make: Callable[[Any, int, float], Workload]
    """Of its parameters, a seed, and how many times as dense its arrivals are."""


KINDS = {
    "chats": Kind("users who chat: each turn repeats what was said", chats.ChatParameters, chats.Chats),
    "agents": Kind("agents: shared tools, many fast turns, tasks that fan out", agents.AgentParameters, agents.Agents),
    "shared-prefix": Kind(
        "llm-d's benchmark: 150 groups of 5 users, a ladder from 3 to 60 requests a second",
        shared_prefix.SharedPrefixParameters,
        shared_prefix.SharedPrefix,
    ),
    "bursts": Kind("popular prefixes, and bursts of one new request", bursts.BurstParameters, bursts.Bursts),
    "no-reuse": Kind("requests that share nothing", no_reuse.NoReuseParameters, no_reuse.NoReuse),
    "mooncake": Kind("a trace in Mooncake's format; or name its file", mooncake.MooncakeParameters, mooncake.Mooncake),
    "text": Kind("a trace with texts and sessions; or name its file", text_trace.TextParameters, text_trace.TextTrace),
}


class Choice(msgspec.Struct, frozen=True):
    """A workload with its parameters, checked; picklable."""

    kind: str
    parameters: msgspec.Struct

    def open(self, *, seed: int, scale: float = 1.0, requests_max: int | None = None) -> Workload:
        """Return the workload, at its beginning. ``scale``: its arrivals are so many times as dense."""
        workload = KINDS[self.kind].make(self.parameters, seed, scale)
        return workload if requests_max is None else Limited(workload, requests_max)


def choose(named: str, parameters: Mapping[str, object]) -> Choice:
    """Return the workload of a name or a trace's file. ConfigError or RequestError for what is none, or for bad parameters."""
    if named not in KINDS:
        named, parameters = kind_of_file(named), {"file": named, **parameters}
    if "file" in names_of_parameters(named) and "file" not in parameters:
        raise ConfigError("workload", f"{named!r} is a trace without its file", "a trace's file, which tells its kind")
    read = read_parameters(KINDS[named].parameters, dict(parameters), "")
    if isinstance(read, shared_prefix.SharedPrefixParameters):
        shared_prefix.stages(read)
    if file := getattr(read, "file", None):
        first_line(file)
    return Choice(named, read)


def kind_of_file(file: str) -> str:
    """Return which kind of trace a file is, by its first line."""
    if not os.path.exists(file):
        raise unknown_name("workload", "workload, nor a file", file, list(KINDS))
    try:
        fields = msgspec.json.decode(first_line(file))
    except msgspec.DecodeError:
        fields = {}
    for kind, field in (("mooncake", "hash_ids"), ("text", "input")):
        if isinstance(fields, dict) and field in fields:
            return kind
    examples = f"lines such as {mooncake.EXAMPLE} or {text_trace.EXAMPLE}"
    raise RequestError(f"{file} line 1", "is of no trace that is known", examples)


def first_line(file: str) -> bytes:
    """Return a trace's first line. RequestError where there is none."""
    for _, _, line in numbered(Path(file)):
        return line
    raise RequestError(file, "is empty", "name a trace: one JSON object a line")


def names_of_parameters(named: str) -> list[str]:
    """Return what can be set of a workload that :func:`choose` takes."""
    kind = named if named in KINDS else kind_of_file(named)
    return [field.name for field in msgspec.structs.fields(KINDS[kind].parameters)]
