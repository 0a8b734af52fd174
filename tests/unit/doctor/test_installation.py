"""What doctor says of this installation's core."""

from __future__ import annotations

import sys

import pytest

from kvatlas.doctor import Check, check_installation
from kvatlas.index.choice import Core, why_no_native


def core_check(core: Core = "auto") -> Check:
    return next(check for check in check_installation(core) if check.name == "core")


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvatlas._native", None)
    monkeypatch.delitem(sys.modules, "kvatlas.index.native", raising=False)


def test_the_native_core_is_fine_and_told_with_its_version() -> None:
    if (missing := why_no_native()) is not None:
        pytest.skip(f"the native core is missing: {missing}")
    check = core_check()
    assert (check.outcome.value, check.remedy) == ("ok", None)
    assert check.seen.startswith("native 0.1.0")


def test_the_reference_for_lack_of_the_native_core_is_a_warning_with_reason_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    without_native(monkeypatch)
    check = core_check()
    assert check.outcome.value == "warn"
    assert f"the native core is missing: {why_no_native()}" in check.seen
    assert "https://rustup.rs" in (check.remedy or "")


def test_the_reference_by_choice_is_fine() -> None:
    check = core_check("reference")
    assert (check.outcome.value, check.seen) == ("ok", "reference (pure Python), as index.core asks")


def test_a_demanded_native_core_that_is_missing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    without_native(monkeypatch)
    assert core_check("native").outcome.value == "fail"
