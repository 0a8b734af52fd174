"""This installation: can it run at all, and which core does the work."""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, entry_points, requires, version

from kvatlas.doctor.check import Check, CheckList
from kvatlas.index.choice import REMEDY, Core, describe_core, why_no_native
from kvatlas.ingest.decode import DECODERS
from kvatlas.score.scorers import SCORERS

PYTHON_MIN = (3, 11)


def check_installation(core: Core = "auto") -> list[Check]:
    """Check Python, packages, core and plugins. ``core``: the setting index.core."""
    found = CheckList("installation")
    _python(found)
    _packages(found)
    _core(found, core)
    for name, group in (("decoders", DECODERS), ("scorers", SCORERS)):
        _plugins(found, name, group)
    return found.checks


def _python(found: CheckList) -> None:
    seen = f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < PYTHON_MIN:
        found.fail("python", seen, "use Python 3.11 or newer")
    else:
        found.ok("python", seen)


def _packages(found: CheckList) -> None:
    """Only presence: which versions go together is the installer's work, and `pip check` tells."""
    try:
        wanted = requires("kvatlas") or []
        ours = version("kvatlas")
    except PackageNotFoundError:
        found.fail("packages", "kvatlas is not installed here, only importable", "install it: pip install kvatlas")
        return
    present, missing = [f"kvatlas {ours}"], []
    for requirement in wanted:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        if "extra ==" in requirement:
            continue
        try:
            present.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        found.fail("packages", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    else:
        found.ok("packages", ", ".join(present))


def _core(found: CheckList, core: Core) -> None:
    missing = None if core == "reference" else why_no_native()
    if missing is None:
        found.ok("core", describe_core(core))
    elif core == "native":
        found.fail("core", f"index.core asks for the native core, which is missing: {missing}", REMEDY)
    else:
        found.warn("core", f"reference (pure Python): slower; the native core is missing: {missing}", REMEDY)


def _plugins(found: CheckList, name: str, group: str) -> None:
    working, broken = [], []
    for entry in entry_points(group=group):
        try:
            entry.load()()
        except Exception as error:  # a plugin is anybody's code
            broken.append(f"{entry.name} ({entry.value}): {type(error).__name__}: {error}")
        else:
            working.append(entry.name)
    if broken:
        found.fail(name, "; ".join(broken), "repair or uninstall the package that brings it")
    elif not working:
        found.fail(name, f"no entry point in group {group}", "install kvatlas again: its metadata is damaged")
    else:
        found.ok(name, ", ".join(sorted(working)))
