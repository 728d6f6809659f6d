# SPDX-License-Identifier: Apache-2.0
"""Settings from YAML files and dotted overrides, with errors for people."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_bert.config import Settings
from megatron_bert.section import explained
from megatron_bert.shipped import find_config
from parallel.errors import UserError, its_class

Kind = TypeVar("Kind", bound=BaseModel)


_BOOL = "tag:yaml.org,2002:bool"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def _as_in_yaml_1_2(tag: str, pattern: re.Pattern[str]) -> re.Pattern[str]:
    """What text a tag takes."""
    if tag == _BOOL:
        return re.compile("(true|True|TRUE|false|False|FALSE)$")
    return re.compile(f"(?![^:]*:)(?:{pattern.pattern})", pattern.flags) if tag in _NUMBERS else pattern


class _Loader(yaml.SafeLoader):
    """YAML whose mappings name every key once; YAML itself would silently keep the last value.

    As in YAML 1.2, ``true`` and ``false`` alone are truth values: ``yes``, ``no``, ``on`` and ``off`` are text, which
    settings that are one or the other take too, and others, such as names of labels, as it is written. So is ``10:12``,
    which YAML 1.1 takes for a number to the base of 60.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        first: [(tag, _as_in_yaml_1_2(tag, pattern)) for tag, pattern in found]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class, after a look at the keys."""
        seen: set[Any] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name} is set twice: remove one of the two", key.start_mark
                )
            if name is not None and name != "<<":
                seen.add(name)
        return super().construct_mapping(node, deep)


class _LoaderAsWritten(_Loader):
    """Numbers and words such as ``0123``, ``1:30`` and ``no`` stay the text they are written as; null stays null."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        first: [
            (tag, pattern) for tag, pattern in found if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
        ]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load_settings(path: Path, overrides: list[str]) -> Settings:
    """The settings of a pretraining run; see :func:`load_sections`."""
    return load_sections(path, overrides, Settings)


def load_sections(path: Path, overrides: list[str], kind: type[Kind], *, as_written: bool = False) -> Kind:
    """Settings of a kind, from a file and overrides; see :func:`read_tree`.

    Raises:
        UserError: as there, a key is unknown (with the nearest known one), or a value does not fit.
    """
    return validated(read_tree(path, overrides, as_written=as_written), kind, source=str(path))


def read_tree(path: Path, overrides: list[str], *, as_written: bool = False) -> dict[str, Any]:
    """Read a YAML file and apply ``section.key=value`` overrides, whose values are YAML too.

    Args:
        path: of the file, or the name of one that comes with the package.
        overrides: in order.
        as_written: take values of the file as text, for names that YAML would take for numbers or truth values.

    Raises:
        UserError: the file cannot be read, or an override is none.
    """
    path = find_config(path)
    try:
        tree = read_mapping(path, "see configs/ for examples", as_written=as_written)
    except OSError as error:
        names = "" if path.suffix in (".yaml", ".yml") else "; `megatron-bert configs` lists those that come with it"
        raise UserError(f"cannot read the settings file {path}: {error.strerror}{names}") from None
    for override in overrides:
        apply_override(tree, override)
    return tree


def read_mapping(path: Path, remedy: str, *, as_written: bool = False) -> dict[str, Any]:
    """What a YAML file holds; nothing of an empty one.

    Args:
        remedy: what to do about a file that holds something else.
        as_written: as for :func:`read_tree`.

    Raises:
        OSError: it cannot be read.
        UserError: it is not text, not YAML, or not a mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _LoaderAsWritten if as_written else _Loader) or {}
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8: save it as such") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_fault(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {its_class(tree)}, not a mapping of sections: {remedy}")
    return tree


def _fault(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the excerpt of the file."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put the value of ``section.key=value`` into nested dictionaries.

    Raises:
        UserError: it is not of that form.
    """
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) < 2:
        raise UserError(f"override {override!r} is not of the form section.key=value, such as training.steps=100")
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {part} holds a value, not a section with keys of its own")
        node = child
    try:
        node[parts[-1]] = yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML; quote it") from None


def validated(tree: dict[str, Any], kind: type[Kind], source: str) -> Kind:
    """A settings model from nested dictionaries.

    Raises:
        UserError: a key is unknown (with the nearest known one), or a value does not fit.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {explained(error, kind)}") from None
