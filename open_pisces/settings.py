"""What all settings have in common, and how a wrong one is explained: file, key, value and remedy."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict

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
