"""Builds the native core (native/) into a wheel where cargo is at hand; where it is not, the wheel says why it has none.

KVATLAS_NATIVE=0   does not try
KVATLAS_NATIVE=1   fails where it cannot be built
not set            tries; without it kvatlas runs on its Python reference, and says so: the wheel is py3-none-any then
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

SWITCH = "KVATLAS_NATIVE"
MODULE = "kvatlas/_native.abi3.so"
RECORD = "kvatlas/_native_missing.txt"
"""Says in one line why there is no native core; kvatlas.index.choice reads it."""
PYTHON_TAG = "cp311"
"""The feature abi3-py311 of native/python: one wheel for this Python and all later ones."""
REASON_CHARS_MAX = 400
REMEDY = "install Rust 1.88 or newer (https://rustup.rs); `pip install -v` shows all that cargo said"


class NativeMissingError(Exception):
    """The native core was not built; says why, as the end of "the native core is missing: ..."."""


class NativeCoreHook(BuildHookInterface[Any]):
    """Puts the module, or the reason why there is none, into a wheel; beside the sources for an editable one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        beside = root / "src" if version == "editable" else None
        self._folder = TemporaryDirectory(prefix="kvatlas-build-")  # hatchling reads from it until finalize
        try:
            built = {MODULE: build_native(root / "native", os.environ)}
        except NativeMissingError as missing:
            if os.environ.get(SWITCH) == "1":
                self.app.abort(f"the native core cannot be built: {missing}; {REMEDY}")
            self.app.display_warning(f"WARNING: kvatlas will run on its Python reference, which is slower: {missing}; {REMEDY}")
            built = {RECORD: Path(self._folder.name) / Path(RECORD).name}
            built[RECORD].write_text(f"{missing} when kvatlas was installed\n", encoding="utf-8")
        else:
            if beside is None:
                build_data["pure_python"] = False
                build_data["tag"] = f"{PYTHON_TAG}-abi3-{_platform_tag()}"
        if beside is None:
            build_data["force_include"].update({str(file): name for name, file in built.items()})
            return
        for name in (MODULE, RECORD):
            (beside / name).unlink(missing_ok=True)  # a process that has it loaded keeps what it has
            if name in built:
                shutil.copyfile(built[name], beside / name)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self._folder.cleanup()


def build_native(workspace: Path, environ: Mapping[str, str]) -> Path:
    """Return the module that cargo built, optimized. NativeMissingError where it did not, or was not to."""
    switch = environ.get(SWITCH)
    if switch not in (None, "", "0", "1"):
        raise SystemExit(f"{SWITCH} is {switch!r}; allowed: 0, 1, or not set")
    if switch == "0":
        raise NativeMissingError(f"{SWITCH}=0 was set")
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise NativeMissingError("no Python with CPython's stable ABI was at hand")
    cargo = shutil.which("cargo", path=environ.get("PATH"))
    if cargo is None:
        raise NativeMissingError("cargo was not found")
    command = [cargo, "build", "--release", "--locked", "--package=kvatlas-native", "--message-format=json-render-diagnostics"]
    with TemporaryFile("w+") as messages:
        try:
            process = subprocess.Popen(  # noqa: S603  # the caller's own cargo
                command, cwd=workspace, env=dict(environ), stdout=messages, stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise NativeMissingError(f"{cargo} could not be run ({error.strerror})") from error
        told = []
        with process:
            for line in process.stderr or ():
                print(line, end="", file=sys.stderr)
                told.append(line.strip())
        if process.returncode != 0:
            raise NativeMissingError(f"cargo could not build it ({_first_error(told)})")
        messages.seek(0)
        return _module_of(messages)


def _module_of(messages: Iterable[str]) -> Path:
    """Return the library among what cargo says it made."""
    for message in messages:
        if not message.startswith("{"):
            continue
        made = json.loads(message)
        if made.get("reason") == "compiler-artifact" and "cdylib" in made["target"]["kind"]:
            return next(Path(name) for name in made["filenames"] if name.endswith((".so", ".dylib")))
    raise NativeMissingError("cargo built no library")


def _first_error(told: Sequence[str]) -> str:
    errors = [line for line in told if line.startswith("error")]
    return (errors or [line for line in reversed(told) if line] or ["it said nothing"])[0][:REASON_CHARS_MAX]


def _platform_tag() -> str:
    """Return the tag of this platform alone: what was built here is not known to run on older ones."""
    return next(tag for tag in platform_tags() if "manylinux" not in tag and "musllinux" not in tag)
