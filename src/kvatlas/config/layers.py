"""Settings from layers of text: file, environment and overrides in; checked msgspec Structs out.

Knows no setting by name. Every refusal is a ConfigError with the setting's path, what is wrong, and what is allowed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import yaml

from kvatlas.config.values import (
    Secret,
    allowed_text,
    convert_scalar,
    default_text,
    field_types,
    near_miss,
    of_text,
    shape_of,
    type_text,
)
from kvatlas.errors import ConfigError

__all__ = ["Secret", "SettingDoc", "build", "describe", "env_name", "parse_yaml", "read_layers"]

_ENV_PREFIX = "KVATLAS_"
_FILE_BYTES_MAX = 4 << 20
_KUBERNETES_NAME = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_KUBERNETES_VALUE = re.compile(r"(tcp|udp|sctp)://[0-9a-fA-F.:\[\]]+:\d+")

S = TypeVar("S", bound=msgspec.Struct)
Tree = dict[str, Any]


class SettingDoc(NamedTuple):
    """One setting, for people. ``path`` has [] for list items and <name> for keys of a mapping."""

    path: str
    type: str
    default: str
    doc: str


def env_name(path: str) -> str:
    """Return the environment variable of a setting: index.maxSize is KVATLAS_INDEX_MAX_SIZE."""
    return _ENV_PREFIX + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", path).replace(".", "_").upper()


def read_layers(
    root: type[msgspec.Struct],
    path: str | os.PathLike[str] | None,
    environ: Mapping[str, str],
    overrides: Sequence[str],
) -> Tree:
    """Return the values given, as one tree; later layers replace earlier ones setting by setting (lists as a whole)."""
    tree = {} if path is None else _read_file(Path(path))
    for setting, annotation, text, variable in _from_environment(root, environ):
        try:
            value = _read_text(annotation, text, setting)
            _convert(annotation, value, setting)
        except ConfigError as error:
            raise ConfigError(error.path, f"{error.problem} (from {variable})", error.allowed) from None
        _put(tree, setting, value)
    for override in overrides:
        setting, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(override, "is no override", 'the form "path=value", such as "index.maxSize=500000"')
        annotation = _find(root, setting)
        _put(tree, setting, _read_text(annotation, text, setting))
    return tree


def build(kind: type[S], tree: Mapping[Any, Any], path: str = "") -> S:
    """Return a Struct with the tree's values, all checked; what the tree leaves out has its default."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    types = field_types(kind)
    for key in tree:
        if key not in fields:
            raise _unknown(_join(path, str(key)), path, list(fields))
    values: dict[str, Any] = {}
    for key, field in fields.items():
        if key in tree:
            values[field.name] = _convert(types[field.name], tree[key], _join(path, key))
        elif field.required:
            raise ConfigError(_join(path, key), "is missing", allowed_text(types[field.name]))
    return kind(**values)


def describe(kind: type[msgspec.Struct], path: str = "") -> list[SettingDoc]:
    """Return the documentation of every setting below a Struct, in its own order."""
    found: list[SettingDoc] = []
    types = field_types(kind)
    for field in msgspec.structs.fields(kind):
        annotation = types[field.name]
        shape = shape_of(annotation)
        here = _join(path, field.encode_name)
        if shape.struct is not None:
            found += describe(shape.struct, here)
            continue
        default = "required" if field.required else default_text(annotation, field)
        found.append(SettingDoc(here, type_text(annotation), default, shape.doc))
        if shape.item is not None and (item := shape_of(shape.item)).struct is not None:
            found += describe(item.struct, f"{here}[]")
    return found


def _convert(annotation: Any, value: Any, path: str) -> Any:
    shape = shape_of(annotation)
    if shape.struct is not None:
        return build(shape.struct, {} if value is None else _mapping(value, path, "a section of settings"), path)
    if value is None:
        if shape.optional:
            return None
        raise ConfigError(path, "has no value", allowed_text(annotation))
    if shape.item is not None:
        if not isinstance(value, list):
            raise ConfigError(path, f"{_seen(value)} is not a list", f"{allowed_text(annotation)}, in brackets: [..., ...]")
        return tuple(_convert(shape.item, item, f"{path}[{position}]") for position, item in enumerate(value))
    if shape.entry is not None:
        entries = _mapping(value, path, allowed_text(annotation))
        return {str(key): _convert(shape.entry, item, _join(path, str(key))) for key, item in entries.items()}
    return convert_scalar(annotation, value, path)


def _mapping(value: Any, path: str, allowed: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(path, f"{_seen(value)} is not a mapping", allowed)
    return value


def _seen(value: Any) -> str:
    return f"{value!r:.60}"


def _unknown(path: str, parent: str, names: Sequence[str]) -> ConfigError:
    close = near_miss(path.rpartition(".")[2], names)
    hint = f'; did you mean "{_join(parent, close)}"?' if close else ""
    return ConfigError(path, f"is no setting{hint}", ", ".join(names))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _find(root: type[msgspec.Struct], setting: str) -> Any:
    """Return the annotation of a setting by its path; ConfigError where there is none."""
    annotation: Any = root
    path = ""
    for name in setting.split("."):
        shape = shape_of(annotation)
        if shape.struct is not None:
            fields = {field.encode_name: field for field in msgspec.structs.fields(shape.struct)}
            if name not in fields:
                raise _unknown(_join(path, name), path, list(fields))
            annotation = field_types(shape.struct)[fields[name].name]
        elif shape.entry is not None and name:
            annotation = shape.entry
        else:
            raise ConfigError(setting, f"{path} has nothing below it", f"{path}=VALUE")
        path = _join(path, name)
    if shape_of(annotation).struct is not None:
        raise ConfigError(setting, "is a section, not a setting", f"{setting}.NAME=VALUE")
    return annotation


def _put(tree: Tree, setting: str, value: Any) -> None:
    *sections, name = setting.split(".")
    for section in sections:
        below = tree.get(section)
        if below is None:
            below = tree[section] = {}
        if not isinstance(below, dict):
            return  # wrong in the file: building names it
        tree = below
    tree[name] = value


def _read_text(annotation: Any, text: str, path: str) -> Any:
    """Return what a variable's or override's text stands for: itself where text is expected, else YAML."""
    literal, value = of_text(annotation, text)
    return value if literal else parse_yaml(text, path)


def _from_environment(root: type[msgspec.Struct], environ: Mapping[str, str]) -> Iterator[tuple[str, Any, str, str]]:
    known = {env_name(path): (path, annotation) for path, annotation in _leaves(root, "")}
    for variable in sorted(environ):
        text = environ[variable]
        if not variable.startswith(_ENV_PREFIX) or _set_by_kubernetes(variable, text):
            continue
        if variable in known:
            yield (*known[variable], text, variable)
            continue
        close = near_miss(variable[len(_ENV_PREFIX) :], [name[len(_ENV_PREFIX) :] for name in known], cutoff=0.9)
        if close or _in_a_section(root, variable):
            hint = f'; did you mean "{_ENV_PREFIX}{close}"?' if close else ""
            raise ConfigError(variable, f"is no setting's variable{hint}", f"such as {env_name('index.maxSize')}")


def _leaves(kind: type[msgspec.Struct], path: str) -> Iterator[tuple[str, Any]]:
    types = field_types(kind)
    for field in msgspec.structs.fields(kind):
        here = _join(path, field.encode_name)
        struct = shape_of(types[field.name]).struct
        if struct is None:
            yield here, types[field.name]
        else:
            yield from _leaves(struct, here)


def _in_a_section(root: type[msgspec.Struct], variable: str) -> bool:
    types = field_types(root)
    return any(
        variable.startswith(env_name(field.encode_name) + "_")
        for field in msgspec.structs.fields(root)
        if shape_of(types[field.name]).struct is not None
    )


def _set_by_kubernetes(variable: str, text: str) -> bool:
    """Whether this is a service link: a Service called kvatlas-api sets KVATLAS_API_PORT=tcp://10.0.0.1:8080 in every pod."""
    return bool(_KUBERNETES_NAME.search(variable)) or (variable.endswith("_PORT") and bool(_KUBERNETES_VALUE.fullmatch(text)))


def _read_file(file: Path) -> Tree:
    try:
        with file.open("rb") as opened:
            content = opened.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(str(file), f"cannot be read: {error.strerror}", "a readable YAML file") from None
    if len(content) > _FILE_BYTES_MAX:
        raise ConfigError(str(file), f"is larger than {_FILE_BYTES_MAX} bytes", "a file of settings")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(str(file), f"is not UTF-8 at byte {error.start}", "a YAML file in UTF-8") from None
    tree = parse_yaml(text, str(file))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(str(file), "holds no settings at its top", 'sections such as "index:" with settings below')
    return tree


def parse_yaml(text: str, path: str) -> Any:
    """Return what YAML (or JSON) says. ConfigError at ``path`` for bad syntax, doubled keys and references."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506  # a SafeLoader that also refuses doubled keys
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(error, "problem", None) or "nested too deeply or out of range"
        raise ConfigError(path, f"is no YAML{where}: {problem}", "YAML without doubled keys or references") from None


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses doubled keys (the first would be lost) and references (a few lines could stand for gigabytes)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]  # its stubs leave it so
            raise yaml.composer.ComposerError(None, None, "references are not supported", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key_node.value!r} is doubled", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)
