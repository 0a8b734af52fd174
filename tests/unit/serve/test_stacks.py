"""What carries a front door."""

from __future__ import annotations

import pytest

from kvatlas.errors import ConfigError
from kvatlas.index.choice import why_no_native
from kvatlas.serve import stacks
from kvatlas.serve.stacks import is_native


def test_by_default_it_is_the_native_core_where_that_is_installed_and_no_tls_is_asked_for() -> None:
    assert is_native("proxy", "auto", tls=False) == (why_no_native() is None)
    assert not is_native("proxy", "auto", tls=True)
    assert not is_native("proxy", "python", tls=False)


def test_what_cannot_be_native_is_refused_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "why_no_native", lambda: None)
    with pytest.raises(ConfigError, match=r"extProc\.stack: .*TLS"):
        is_native("extProc", "native", tls=True)
    monkeypatch.setattr(stacks, "why_no_native", lambda: "cargo was not found")
    with pytest.raises(ConfigError, match=r"proxy\.stack: .*cargo was not found"):
        is_native("proxy", "native", tls=False)
    assert not is_native("proxy", "auto", tls=False)
