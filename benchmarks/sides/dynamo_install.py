"""The environment that NVIDIA Dynamo runs in: one of its own, made on first use and kept in a cache directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

VERSION = "1.6.1"
PACKAGE = f"ai-dynamo-runtime=={VERSION}"
NAME = f"ai-dynamo-runtime {VERSION}"
_ALSO = ("msgspec>=0.19",)
"""Not Dynamo's: the streams are made with it, on both sides."""


class BaselineError(RuntimeError):
    """A baseline could not be installed or started."""


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvatlas" / "benchmarks" / f"ai-dynamo-runtime-{VERSION}"


def interpreter() -> Path:
    """Return a Python that has Dynamo; install it if it is not there yet. Raises BaselineError."""
    directory = cache_directory()
    python = directory / "bin" / "python"
    done = directory / ".installed"
    if done.exists() and python.exists():
        return python
    print(f"Installing {PACKAGE} into {directory} (once; about 80 MB from PyPI).", file=sys.stderr)
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet", PACKAGE, *_ALSO]
    installed = subprocess.run(pip, capture_output=True, text=True, check=False)
    if installed.returncode:
        shutil.rmtree(directory, ignore_errors=True)
        lines = [line for line in installed.stderr.strip().splitlines() if line.strip()]
        raise BaselineError(
            f"{PACKAGE} could not be installed from PyPI. It is what these figures are compared with; with a network or a "
            f"mirror (PIP_INDEX_URL) run this again. pip said: {lines[-1] if lines else 'nothing'}"
        )
    done.touch()
    return python
