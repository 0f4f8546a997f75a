"""What all settings have in common, and how a wrong one is explained: file, key, value and remedy."""

from __future__ import annotations

import difflib
import re
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from open_pisces.errors import PiscesError


class ConfigError(PiscesError):
    """A setting that cannot be used; the message names file, key, value and remedy."""


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values are not coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def explain(kind: type[Settings], issue: Any, where: dict[str, str]) -> str:
    """One line for one wrong setting: file, key, value and the remedy. ``issue`` is one of pydantic's errors."""
    key = ".".join(str(part) for part in issue["loc"])
    section, _, name = key.rpartition(".")
    file = where.get(key) or where.get(section) or where.get("", "settings")
    if issue["type"] != "extra_forbidden":
        return f"{file}: {key} = {issue['input']!r}: {issue['msg']}"
    hint = "see open_pisces/config.py for all keys"
    known = {k: k.rpartition(".")[2] for k in _keys(kind)}
    near = difflib.get_close_matches(name, known.values(), 1, 0.5)
    if near:  # the same name may be a key of several sections: the one that was written is tried first
        full = [f"{section}.{near[0]}".lstrip("."), *(k for k in known if known[k] == near[0])]
        hint = f"did you mean {full[0] if full[0] in known else full[1]}?"
    return f"{file}: unknown key {key} (value {issue['input']!r}): {hint}"


def _keys(kind: type[Settings], prefix: str = "") -> list[str]:
    """All dotted keys of a settings class."""
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            keys += _keys(inner, f"{prefix}{name}.")
    return keys


# ------------------------------------------------------------------------------------------- nested values of YAML


class YamlLoader(yaml.SafeLoader):
    """YAML that reads ``2e-5`` as a number; YAML 1.1 takes it for a string."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` merged over ``base``: mappings key by key, everything else replaced."""
    merged = dict(base)
    for key, value in over.items():
        both_are_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both_are_mappings else value
    return merged


def set_override(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    """Write one dotted override into nested ``values``; entries of a list are addressed by number."""
    here: Any = values
    for key in keys[:-1]:
        here = here[_place(here, key, override)] if isinstance(here, list) else here.setdefault(key, {})
        if not isinstance(here, dict | list):
            raise ConfigError(f"override {override!r}: {key!r} is a single value and has no keys below it")
    here[_place(here, keys[-1], override)] = value


def _place(here: dict[str, Any] | list[Any], key: str, override: str) -> Any:
    """``key`` as an index: itself for a mapping, a number for a list."""
    if isinstance(here, dict):
        return key
    if not key.isdecimal() or int(key) >= len(here):
        raise ConfigError(f"override {override!r}: {key!r} is not an entry of a list of {len(here)}; they count from 0")
    return int(key)


def validate(kind: type[Settings], values: dict[str, Any], where: dict[str, str]) -> Any:
    """Build ``kind`` from ``values``; a `ConfigError` has one line for each wrong setting.

    ``where`` says where values came from, by dotted key; ``""`` stands for all others.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(kind, issue, where) for issue in error.errors())) from None
