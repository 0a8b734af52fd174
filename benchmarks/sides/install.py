"""Environments that other people's packages run in: one each, made on first use and kept in a cache directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path


class BaselineError(RuntimeError):
    """A baseline could not be installed or started."""


def environment(requirement: str, *also: str) -> Path:
    """Return the ``bin`` directory of an environment with a package; install it if it is not there yet. Raises BaselineError.

    ``requirement``: as pip takes it, ``name==version``. ``also``: what else is installed there.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(base) / "kvatlas" / "benchmarks" / requirement.replace("==", "-")
    python = directory / "bin" / "python"
    done = directory / ".installed"
    if done.exists() and python.exists():
        return python.parent
    print(f"Installing {requirement} from PyPI into {directory} (once).", file=sys.stderr)
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet", requirement, *also]
    installed = subprocess.run(pip, capture_output=True, text=True, check=False)
    if installed.returncode:
        shutil.rmtree(directory, ignore_errors=True)
        lines = [line for line in installed.stderr.strip().splitlines() if line.strip()]
        raise BaselineError(
            f"{requirement} could not be installed from PyPI. It is what these figures are compared with; with a network or a "
            f"mirror (PIP_INDEX_URL) run this again. pip said: {lines[-1] if lines else 'nothing'}"
        )
    done.touch()
    return python.parent
