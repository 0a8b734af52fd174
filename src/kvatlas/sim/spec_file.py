"""An engine as a file: what ``kvatlas calibrate`` writes, and ``kvatlas engine`` and ``kvatlas simulate`` read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import yaml

from kvatlas.config.layers import build, parse_yaml
from kvatlas.errors import ConfigError
from kvatlas.sim.checks import check_spec
from kvatlas.sim.engines import EngineSpec

BYTES_MAX = 1 << 20
DIGITS = 6
"""Of a cost: more of them are noise."""


def read_spec(path: Path) -> EngineSpec:
    """Return the engine that a file describes. ConfigError names the file and the field."""
    try:
        with path.open("rb") as file:
            content = file.read(BYTES_MAX + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}", "a file as `kvatlas calibrate` writes it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"is not UTF-8 at byte {error.start}", "YAML or JSON in UTF-8") from None
    if len(content) > BYTES_MAX:
        raise ConfigError(str(path), f"is larger than {BYTES_MAX} bytes", "one engine's description")
    return spec_of(text, str(path))


def spec_of(text: str, source: str) -> EngineSpec:
    """Return the engine that YAML or JSON describes. Field names are those of EngineSpec; unknown ones are refused."""
    tree = parse_yaml(text, source)
    if not isinstance(tree, dict):
        raise ConfigError(source, "is no mapping", "an engine's fields: costs, gpu_blocks, ...")
    spec = build(EngineSpec, tree, source)
    try:
        check_spec(spec)
    except ValueError as error:
        field, _, said = str(error).partition(": expected ")
        allowed, _, value = said.rpartition(", got ")
        raise ConfigError(f"{source}.{field}", f"is {value}", allowed) from None
    return spec


def spec_text(spec: EngineSpec, remarks: Sequence[str] = ()) -> str:
    """Return YAML that :func:`spec_of` reads back, behind remarks. Costs are rounded."""
    tree = msgspec.to_builtins(spec)
    tree["costs"] = {name: float(f"{seconds:.{DIGITS}g}") for name, seconds in tree["costs"].items()}
    lines = [f"# {line}".rstrip() for line in remarks]
    return "\n".join([*lines, yaml.safe_dump(tree, sort_keys=False)])
