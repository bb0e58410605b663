"""Configuration: layers of YAML and ``key=value`` merged once onto a frozen dataclass.

Only `jobs/`, `serve/` and the command line import this room; the library takes keyword arguments. A schema is a frozen
dataclass whose fields are made with `setting`, so that ``--help`` can be printed without importing anything heavy.
"""

import dataclasses
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gretfound.errors import ConfigError

Schema = TypeVar("Schema")


def setting(default: Any = MISSING, help: str = "") -> Any:
    """Declares one key of a schema; without a default the key is required.

    Args:
        default: The default value; lists, dicts and dataclasses are copied for each schema.
        help: One line for ``--help``, with the unit where there is one.
    """
    metadata = {"help": help}
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: _copied(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _copied(default: Any) -> Any:
    if dataclasses.is_dataclass(default):
        return default if not isinstance(default, type) else default()
    return default.copy()


def load(schema: type[Schema], argv: Sequence[str]) -> Schema:
    """Merges the layers in ``argv``, left to right, onto ``schema``'s defaults.

    Args:
        schema: A frozen dataclass whose fields are made with `setting`.
        argv: Arguments that end in ``.yaml`` are layers, ``key=value`` are overrides.

    Returns:
        A frozen instance of ``schema``.

    Raises:
        ConfigError: If an argument, a key, a value or a combination is wrong, or a required key is missing; every
            fault is listed.
    """
    faults: list[str] = []
    merged = OmegaConf.structured(schema)
    for argument in argv:
        try:
            if argument.endswith(".yaml") and "=" not in argument:
                layer = OmegaConf.load(argument)
            elif "=" in argument and not argument.startswith("-"):
                layer = OmegaConf.from_dotlist([argument])
            else:
                faults.append(f"{argument!r} is neither a .yaml file nor key=value")
                continue
        except FileNotFoundError:
            faults.append(f"{argument!r} does not exist; the current directory is searched")
            continue
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            faults.append(f"{argument!r} could not be parsed: {error}")
            continue
        for key, value in _leaves(OmegaConf.to_container(layer)):
            try:
                merged = OmegaConf.merge(merged, _nested(key, value))
            except OmegaConfBaseException as error:
                reason = (error.msg or str(error)).splitlines()[0]
                faults.append(f"{key}: {reason} (from {argument!r})")
    faults.extend(f"{key}: required; give {key}=VALUE" for key in sorted(OmegaConf.missing_keys(merged)))
    if faults:
        raise ConfigError(_listed(schema, faults))
    try:
        return typing.cast(Schema, OmegaConf.to_object(merged))
    except (ConfigError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_listed(schema, [str(error).splitlines()[0]])) from error


def describe(schema: type) -> str:
    """Returns a table of every key of ``schema`` with its type, default and help, for ``--help``."""
    rows = [
        (key, kind, "required" if default == MISSING else repr(default), text)
        for key, kind, default, text in _keys(schema)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)) + f"  {row[3]}"
        for row in rows
    )


def to_yaml(config: Any) -> str:
    """Returns the merged configuration as YAML, to be written beside the output before any work starts."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def canonical(config: Any) -> dict[str, Any]:
    """Returns the merged configuration as plain JSON-able values, for digests."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def _listed(schema: type, faults: list[str]) -> str:
    lines = "\n".join(f"  - {fault}" for fault in faults)
    module = schema.__module__ if schema.__module__ != "__main__" else _main_module()
    return f"{len(faults)} fault(s) in the configuration:\n{lines}\n`python -m {module} --help` lists every key."


def _main_module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else "jobs.NAME"


def _leaves(container: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(container, dict) or not container:
        return [(prefix, container)] if prefix else []
    return [leaf for key, value in container.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else key)]


def _nested(key: str, value: Any) -> Any:
    for part in reversed(key.split(".")):
        value = {part: value}
    return OmegaConf.create(value)


def _keys(schema: type, prefix: str = "") -> list[tuple[str, str, Any, str]]:
    rows: list[tuple[str, str, Any, str]] = []
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            rows.extend(_keys(typing.cast(type, kind), f"{prefix}{field.name}."))
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        rows.append((prefix + field.name, _named(kind), default, field.metadata.get("help", "")))
    return rows


def _named(kind: Any) -> str:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is not None:
        return str(kind).replace("typing.", "")
    return typing.cast(str, kind.__name__)
