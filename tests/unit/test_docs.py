"""The documentation agrees with the code: links, commands, settings, metrics, code blocks, and what generates pages."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml
from typer.core import TyperGroup

from kvatlas.cli.app import app
from kvatlas.config import describe_config, load_config
from kvatlas.config.layers import env_name
from kvatlas.route.picker_config import read_config

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
SECTIONS = "zmq|api|keys|tokens|index|ingest|tieredCache|sources|log"
OTHER_VARIABLES = {"KVATLAS_URL", "KVATLAS_NATIVE"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def blocks(page: Path, language: str) -> list[str]:
    """Return a page's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


# -- links --------------------------------------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    """Return a heading's anchor as repository hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pages
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r"^\[[^\]]+\]: (\S+)$", prose(page), re.MULTILINE)
    broken = []
    for target in targets:
        if target.startswith(("https://", "http://")):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (fragment and fragment not in map(anchor, re.findall(r"^#+ (.+)$", file.read_text(), re.M))):
            broken.append(target)
    assert not broken


def test_every_page_is_in_the_index() -> None:
    index = (REPOSITORY / "docs" / "index.md").read_text()
    listed = {(REPOSITORY / "docs" / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", index)}
    assert set((REPOSITORY / "docs").rglob("*.md")) - {REPOSITORY / "docs" / "index.md"} <= listed


# -- commands -----------------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[str]:
    """Yield what a page tells people to type: lines of shell blocks, and code in the text."""
    for block in blocks(page, "sh"):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", prose(page))


@pages
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    asked = {match for command in commands(page) for match in re.findall(r"^make ([a-z]+)", command)}
    assert asked <= targets


@pages
def test_kvatlas_commands_and_their_options_exist(page: Path) -> None:
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    known = {name: {option for given in found.params for option in given.opts} for name, found in root.commands.items()}
    wrong = []
    for command in commands(page):
        for called in re.findall(r"(?:^|\| |/)kvatlas ((?:serve|[a-z]+)\b[^|#]*)", command):
            name, *arguments = shlex.split(called)
            options = {argument.partition("=")[0] for argument in arguments if argument.startswith("-") and len(argument) > 1}
            if name not in known or not options <= known[name] | {"--help"}:
                wrong.append(command)
    assert not wrong


def test_makefile_helps_with_every_target() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split())  # type: ignore[index]
    assert phony == set(re.findall(r"^([a-z]+):.*## ", makefile, re.MULTILINE))


# -- settings and metrics -----------------------------------------------------------------------------------------------


@cache
def settings() -> frozenset[str]:
    """Return the path of every setting and section."""
    paths = {setting.path.replace("[]", "") for setting in describe_config()}
    return frozenset(paths | {path.rpartition(".")[0] for path in paths})


@pages
def test_settings_exist(page: Path) -> None:
    named = set(re.findall(rf"`((?:{SECTIONS})\.[a-z][A-Za-z.]+)[`:]", prose(page)))
    weights = {name for name in named if name.startswith("tieredCache.weights.")}
    assert named - weights <= settings()
    variables = set(re.findall(r"\bKVATLAS_[A-Z_]+\b", page.read_text()))
    assert variables <= {env_name(path) for path in settings() if path} | OTHER_VARIABLES


@pages
def test_yaml_blocks_are_good_settings_or_picker_configurations(page: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    for block in blocks(page, "yaml"):
        if re.search(r"^plugins:", block, re.MULTILINE):
            assert read_config(block).plugins
            continue
        file = tmp_path / "kvatlas.yaml"
        file.write_text(block.replace("/etc/kvatlas/token", str(token)))
        load_config(file, environ={})
        assert yaml.safe_load(block)


@pages
def test_metrics_exist(page: Path) -> None:
    text = (REPOSITORY / "docs" / "metrics.md").read_text()
    known = set(re.findall(r"^\| `(\w+)` \| (?:counter|gauge|histogram)", text, re.MULTILINE))
    of_engines = {"kv_cache_spec_kind", "kv_cache_spec_sliding_window", "kv_cache_report_mode", "kv_cache_usage_perc"}
    assert set(re.findall(r"\bkv_cache_\w+", page.read_text())) <= known | of_engines
    of_routers = set(re.findall(r"\bkvatlas_(?:route|proxy|extproc)_\w+", page.read_text()))
    assert {name.removesuffix("_bucket") for name in of_routers} <= known


# -- code ---------------------------------------------------------------------------------------------------------------


@pages
def test_python_blocks_compile_and_import_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), block


ALLOWED_IMPORTS = {
    "types": set(),
    "errors": set(),
    "netloc": set(),
    "keys": {"types", "errors"},
    "results": {"keys", "types"},
    "index": {"keys", "types", "errors"},
    "score": {"index", "keys", "types", "errors"},
    "config": {"errors"},
    "observe": {"config", "results", "types", "errors"},
    "mail": set(),
    "tokens": {"mail", "config", "observe", "types", "errors", "proto"},
    "ingest": {"index", "keys", "config", "observe", "types", "errors", "proto"},
    "indexer": {"ingest", "index", "score", "keys", "config", "observe", "results", "types", "errors"},
    "route": {"indexer", "index", "score", "keys", "config", "results", "netloc", "types", "errors"},
    "discovery": {"route", "tokens", "config", "observe", "netloc", "types", "errors", "proto"},
    "cache_scorer": {"indexer", "keys", "results", "types"},
}
"""What ARCHITECTURE.md says of imports. Modules that are not here are edges, and may import all of these."""


def test_imports_point_one_way() -> None:
    source = REPOSITORY / "src" / "kvatlas"
    wrong = []
    for file in source.rglob("*.py"):
        module = file.relative_to(source).with_suffix("").parts[0]
        if module not in ALLOWED_IMPORTS:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kvatlas."):
                imported = node.module.split(".")[1]
                if imported != module and imported not in ALLOWED_IMPORTS[module]:
                    wrong.append(f"{file.relative_to(source)} imports {imported}")
    assert not wrong


def test_architecture_has_a_row_for_every_module() -> None:
    """Where this fails: add a row to the table in ARCHITECTURE.md."""
    text = (REPOSITORY / "ARCHITECTURE.md").read_text()
    source = REPOSITORY / "src" / "kvatlas"
    modules = [path.name + ("/" if path.is_dir() else "") for path in source.iterdir() if path.suffix == ".py" or path.is_dir()]
    assert [name for name in modules if f"`{name}`" not in text and name not in ("__init__.py", "__pycache__/")] == []
    for folder in ("config", "ingest", "index", "score", "keys", "tokens", "route", "serve"):
        for file in (source / folder).glob("*.py"):
            assert file.name == "__init__.py" or f"`{folder}/{file.name}`" in text, f"{folder}/{file.name}"
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", text)
    assert [name for name in named if not (source / name).exists() and not (REPOSITORY / name).exists()] == []


# -- generated pages, and what must not be there ------------------------------------------------------------------------


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", REPOSITORY / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_what_the_code_says() -> None:
    """Where this fails: make docs"""
    assert generator().behind() == []


def test_nothing_names_a_place_on_one_machine() -> None:
    homes = "|".join(("work", "root", "home/[a-z]+", "Users"))
    machine_path = re.compile(rf"(?:^|[^A-Za-z0-9_.$}}\]/-])/(?:{homes})/", re.MULTILINE)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=False)  # noqa: S607
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = []
    for name in listed.stdout.decode().split("\0"):
        file = REPOSITORY / name
        if name and file.is_file() and b"\0" not in (content := file.read_bytes()):
            found += [name for _ in machine_path.finditer(content.decode("utf-8", "replace"))]
    assert found == []
