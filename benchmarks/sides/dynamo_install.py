"""The environment that NVIDIA Dynamo runs in."""

from __future__ import annotations

from pathlib import Path

from benchmarks.sides.install import environment

VERSION = "1.6.1"
NAME = f"ai-dynamo-runtime {VERSION}"
_ALSO = "msgspec>=0.19"
"""Not Dynamo's: the streams are made with it, on both sides."""


def interpreter() -> Path:
    """Return a Python that has Dynamo. Raises BaselineError."""
    return environment(f"ai-dynamo-runtime=={VERSION}", _ALSO) / "python"
