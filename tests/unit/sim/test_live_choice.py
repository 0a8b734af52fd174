"""Which engine an embedded engine simulates."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvatlas.errors import ConfigError
from kvatlas.sim.live.choice import SMALL, chosen_spec
from kvatlas.sim.presets import PRESETS
from kvatlas.sim.spec_file import spec_text


def test_sizes_that_are_given_replace_those_of_the_preset() -> None:
    spec = chosen_spec("small", None, 100, 32)
    assert (spec.gpu_blocks, spec.block_size_tokens, spec.costs) == (100, 32, SMALL.costs)


def test_a_preset_of_the_simulator_may_be_named() -> None:
    name = next(iter(PRESETS))
    assert chosen_spec(name, None, None, None) == PRESETS[name].spec


def test_a_file_counts_more_than_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(spec_text(chosen_spec("small", None, 77, None)))
    assert chosen_spec("small", file, None, None).gpu_blocks == 77


def test_a_preset_that_is_none_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="small, "):
        chosen_spec("tall", None, None, None)
