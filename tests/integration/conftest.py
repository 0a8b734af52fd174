"""Fixtures of tests that run real servers."""

from __future__ import annotations

import pytest

from kvatlas.index.choice import why_no_native
from tests.integration import proxying
from tests.models import picker


@pytest.fixture(params=["native", "python"])
def each_stack(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with each stack of the proxy (HTTP) and of the endpoint picker (gRPC); return its name."""
    stack: str = request.param
    if stack == "native" and why_no_native() is not None:
        pytest.skip("the native core is not installed")
    monkeypatch.setattr(proxying, "default_stack", stack)
    monkeypatch.setattr(picker, "default_stack", stack)
    return stack
