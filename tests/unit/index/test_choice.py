"""Which core does the work, and what is said where it is not the native one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvatlas import Indexer
from kvatlas.config import load_config
from kvatlas.errors import ConfigError
from kvatlas.index import IndexLimits, make_index
from kvatlas.index.choice import describe_core, why_no_native
from kvatlas.keys import KeySchema


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python finds no kvatlas._native, built or not."""
    monkeypatch.setitem(sys.modules, "kvatlas._native", None)
    monkeypatch.delitem(sys.modules, "kvatlas.index.native", raising=False)


def test_auto_is_native_where_it_is_installed_and_else_the_reference() -> None:
    assert make_index().core == ("native" if why_no_native() is None else "reference")
    assert describe_core().startswith(make_index().core)


def test_reference_is_used_where_it_is_asked_for() -> None:
    assert make_index(core="reference").core == "reference"
    assert describe_core("reference") == "reference (pure Python), as index.core asks"


def test_limits_and_schema_reach_the_index_of_either_core() -> None:
    index = make_index(KeySchema(4), IndexLimits(blocks_max=7), lambda: 0.0)
    assert index.stats().blocks == 0


@pytest.mark.usefixtures("without_native")
def test_without_native_auto_falls_back_and_says_why_and_what_to_do(tmp_path: Path) -> None:
    assert make_index().core == "reference"
    record = tmp_path / "missing.txt"
    record.write_text("cargo was not found when kvatlas was installed\n")
    assert why_no_native(record) == "cargo was not found when kvatlas was installed"
    assert "the native core is missing" in describe_core()
    assert "https://rustup.rs" in describe_core()


@pytest.mark.usefixtures("without_native")
def test_without_native_and_without_a_record_it_says_that_nothing_built_it(tmp_path: Path) -> None:
    assert "nothing has built it" in (why_no_native(tmp_path / "none.txt") or "")


@pytest.mark.usefixtures("without_native")
def test_a_native_core_that_is_demanded_and_missing_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"index\.core: the native core is missing: .*rustup\.rs.*; allowed: auto, reference"):
        make_index(core="native")


def test_a_native_core_that_cannot_be_loaded_is_told_from_one_that_was_not_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "kvatlas.index.native", None)
    record = tmp_path / "missing.txt"
    record.write_text("cargo was not found when kvatlas was installed\n")
    assert (why_no_native(record) or "").startswith("it is there, but cannot be imported (")


def test_the_indexer_takes_the_core_from_its_settings_and_the_metric_tells_it() -> None:
    indexer = Indexer(load_config(environ={"KVATLAS_INDEX_CORE": "reference"}))
    assert indexer.index.core == "reference"
    assert 'kv_cache_core_info{core="reference"} 1.0' in indexer.metrics.render().decode()


def test_an_unknown_core_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"index\.core.*native"):
        load_config(environ={}, overrides=["index.core=rust"])
