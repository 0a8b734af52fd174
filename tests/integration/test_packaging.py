"""Wheels and the source distribution as they are really built: with a cargo that builds, with one that fails, and with none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import kvatlas

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not (REPOSITORY / "hatch_build.py").exists(), reason="no checkout")


def build(target: str, folder: Path, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in os.environ.items() if not name.startswith(("KVATLAS_", "CARGO"))}
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    return subprocess.run(
        command, cwd=REPOSITORY, env={**given, **environ}, capture_output=True, text=True, timeout=100, check=False
    )


def a_cargo(folder: Path, script: str) -> Mapping[str, str]:
    """Return an environment whose cargo is a shell script."""
    folder.mkdir()
    (folder / "cargo").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "cargo").chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def no_cargo(folder: Path) -> Mapping[str, str]:
    folder.mkdir()
    return {"PATH": str(folder)}


def the_wheel(folder: Path) -> zipfile.ZipFile:
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel that is built where there is no cargo."""
    folder = tmp_path_factory.mktemp("plain")
    done = build("wheel", folder, no_cargo(tmp_path_factory.mktemp("nothing") / "bin"))
    assert done.returncode == 0, done.stderr
    assert "WARNING" in done.stderr
    assert "cargo was not found" in done.stderr
    return folder


def test_without_cargo_the_wheel_is_for_any_machine_and_says_what_is_missing(plain: Path) -> None:
    assert [path.name for path in plain.iterdir()] == [f"kvatlas-{kvatlas.__version__}-py3-none-any.whl"]
    with the_wheel(plain) as wheel:
        assert wheel.read("kvatlas/_native_missing.txt").decode() == "cargo was not found when kvatlas was installed\n"
        assert not [name for name in wheel.namelist() if name.endswith((".so", ".rs"))]


def test_a_wheel_has_all_that_is_no_module_too(plain: Path) -> None:
    with the_wheel(plain) as wheel:
        names = set(wheel.namelist())
    package = REPOSITORY / "src"
    wanted = [path for path in package.rglob("*") if path.suffix in (".py", ".pyi", ".gz", ".typed")]
    assert {str(path.relative_to(package)) for path in wanted} <= names


def test_doctor_of_such_an_installation_warns_with_reason_and_remedy(plain: Path, tmp_path: Path) -> None:
    shown = run_installed(plain, tmp_path, "doctor", "--json")
    check = next(found for line in shown.stdout.splitlines() if (found := json.loads(line)).get("name") == "core")
    assert check["outcome"] == "warn"
    assert "reference" in check["seen"]
    assert "cargo was not found when kvatlas was installed" in check["seen"]
    assert "https://rustup.rs" in check["remedy"]


@pytest.mark.parametrize(("core", "level"), [("auto", "warning"), ("reference", "info")])
def test_such_a_services_first_log_line_tells_the_core(plain: Path, tmp_path: Path, core: str, level: str) -> None:
    settings = ["api.port=0", "api.grpcPort=0", "zmq.bind=false", f"index.core={core}"]
    command = [sys.executable, "-m", "kvatlas", "serve", *(f"--set={setting}" for setting in settings)]
    with subprocess.Popen(command, env=installed(plain, tmp_path), stderr=subprocess.PIPE, text=True) as service:
        assert service.stderr is not None
        first = json.loads(service.stderr.readline())
        service.kill()
    assert (first["level"], first["core"]) == (level, "reference")
    assert first.get("reason") == ("cargo was not found when kvatlas was installed" if core == "auto" else None)


def test_such_a_service_refuses_to_be_native(plain: Path, tmp_path: Path) -> None:
    shown = run_installed(plain, tmp_path, "serve", "--set", "index.core=native")
    assert shown.returncode != 0
    assert "the native core is missing: cargo was not found" in shown.stderr


def installed(folder: Path, place: Path) -> Mapping[str, str]:
    """Unpack a wheel and return an environment in which it goes over any other kvatlas."""
    with the_wheel(folder) as wheel:
        wheel.extractall(place)  # noqa: S202  # built just before
    given = {name: value for name, value in os.environ.items() if not name.startswith("KVATLAS_")}
    return {**given, "PYTHONPATH": str(place), "COLUMNS": "200"}


def run_installed(folder: Path, place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvatlas", *arguments]
    return subprocess.run(
        command, env=installed(folder, place), cwd=place, capture_output=True, text=True, timeout=60, check=False
    )


def test_what_cargo_built_makes_a_wheel_of_the_stable_abi(tmp_path: Path) -> None:
    """This cargo's answer is one as cargo 1.95 gave it."""
    library = tmp_path / "lib_native.so"
    library.write_bytes(b"built")
    answer = {"reason": "compiler-artifact", "target": {"kind": ["cdylib"], "name": "_native"}, "filenames": [str(library)]}
    (tmp_path / "answer").write_text(json.dumps({"reason": "build-script-executed"}) + "\n" + json.dumps(answer) + "\n")
    script = f'echo "$@" > {tmp_path}/asked; pwd >> {tmp_path}/asked; cat {tmp_path}/answer'
    done = build("wheel", tmp_path / "dist", a_cargo(tmp_path / "bin", script))
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "dist").glob("*.whl")
    assert path.name.startswith(f"kvatlas-{kvatlas.__version__}-cp311-abi3-")
    with the_wheel(tmp_path / "dist") as wheel:
        assert wheel.read("kvatlas/_native.abi3.so") == b"built"
        assert "kvatlas/_native_missing.txt" not in wheel.namelist()
    arguments, folder = (tmp_path / "asked").read_text().splitlines()
    assert {"--release", "--locked"} <= set(arguments.split())
    assert folder == str(REPOSITORY / "native")


FAILING = "echo '   Compiling kvatlas-core' >&2; echo 'error: linker `cc` not found' >&2; exit 101"


def test_a_cargo_that_fails_leaves_a_plain_wheel_that_tells_its_error(tmp_path: Path) -> None:
    done = build("wheel", tmp_path / "dist", a_cargo(tmp_path / "bin", FAILING))
    assert done.returncode == 0, done.stderr
    with the_wheel(tmp_path / "dist") as wheel:
        told = wheel.read("kvatlas/_native_missing.txt").decode()
    assert told == "cargo could not build it (error: linker `cc` not found) when kvatlas was installed\n"
    assert [path.name for path in (tmp_path / "dist").iterdir()] == [f"kvatlas-{kvatlas.__version__}-py3-none-any.whl"]


def test_a_native_core_that_is_demanded_is_built_or_the_build_fails(tmp_path: Path) -> None:
    for number, environ in enumerate((no_cargo(tmp_path / "none"), a_cargo(tmp_path / "bin", FAILING))):
        done = build("wheel", tmp_path / str(number), {**environ, "KVATLAS_NATIVE": "1"})
        assert done.returncode != 0
        assert "the native core cannot be built: " in done.stderr + done.stdout
        assert not list(tmp_path.glob(f"{number}/*.whl"))


def test_a_native_core_that_is_not_wanted_is_not_tried(tmp_path: Path) -> None:
    done = build("wheel", tmp_path / "dist", {**a_cargo(tmp_path / "bin", "exit 1"), "KVATLAS_NATIVE": "0"})
    assert done.returncode == 0, done.stderr
    with the_wheel(tmp_path / "dist") as wheel:
        assert wheel.read("kvatlas/_native_missing.txt").startswith(b"KVATLAS_NATIVE=0 was set")


def test_another_value_of_the_switch_is_refused(tmp_path: Path) -> None:
    done = build("wheel", tmp_path / "dist", {"KVATLAS_NATIVE": "yes"})
    assert done.returncode != 0
    assert "allowed: 0, 1" in done.stderr


def test_the_source_distribution_has_what_the_native_core_is_built_from(tmp_path: Path) -> None:
    done = build("sdist", tmp_path, {})
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = [*(REPOSITORY / "native").glob("*/src/**/*.rs"), *(REPOSITORY / "native").glob("**/Cargo.toml")]
    wanted = {str(path.relative_to(REPOSITORY)) for path in sources if "target" not in path.parts}
    assert wanted | {"native/Cargo.lock", "native/.cargo/config.toml", "hatch_build.py", "pyproject.toml"} <= names
    assert not [name for name in names if "/target/" in name or name.endswith(".so")]


def test_all_say_one_version() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    workspace = tomllib.loads((REPOSITORY / "native" / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    assert project == workspace == kvatlas.__version__
