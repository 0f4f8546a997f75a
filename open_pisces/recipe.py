"""Recipes: YAML files that say what differs from the defaults of `config`.

Precedence is one sentence: defaults < YAML < ``key=value``. A recipe may start with ``extends: NAME`` (a recipe
beside it, an address such as ``tiny/base``, or a path), or with a list of them, of which later ones win; the recipe's
own keys win over all. A key that does not exist, or a value of the wrong type, is refused with the file, the key, the
value and the nearest right key.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from open_pisces.config import RunConfig
from open_pisces.settings import ConfigError, YamlLoader, merge, set_override, validate

RECIPES = Path(__file__).parent / "recipes"
TRAININGS = ("understanding_clip", "gen_clip", "decoder", "stage1", "stage2", "stage3", "decoder_on_predicted")
"""In the order in which they run. A scale has those it has a recipe for; the last is not the paper's."""


class StartMissingError(ConfigError):
    """A recipe takes the settings of the folder that it starts from, and there is none at ``start``."""

    def __init__(self, message: str, start: Path) -> None:
        super().__init__(message)
        self.start = start


def load_config(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a recipe and apply ``key=value`` overrides.

    Args:
        recipe: a name such as ``tiny/stage1``, or the path of a YAML file.
        overrides: dotted keys with YAML values, such as ``train.lr=3e-4``.

    Raises:
        ConfigError: if the recipe is missing, or a key or value is wrong.
        StartMissingError: if it takes the settings of a folder that is not there.
    """
    path = find_recipe(recipe)
    values = _read(path)
    where = {"": str(path)}
    for override in overrides:
        where[_override(values, override)] = "command line"
    values.setdefault("name", f"{path.parent.name}/{path.stem}")
    if isinstance(values.get("model"), dict) and values["model"].get("settings") == "start":
        values["model"] = _with_settings_of_start(values["model"], str(path))
    return validate(RunConfig, values, where)


def _with_settings_of_start(model: dict[str, Any], where: str) -> dict[str, Any]:
    """The start folder's own settings under a recipe's.

    Raises:
        StartMissingError: if there is no such folder.
    """
    start = Path(str(model.get("start")))
    card = start / "config.json"
    if not card.is_file():
        message = f"{where}: model.start = {model.get('start')}: no model folder there: set it to the one to tune"
        raise StartMissingError(message, start)
    return merge(json.loads(card.read_text())["model"], model)


def override_values(overrides: Sequence[str]) -> dict[str, Any]:
    """``key=value`` settings alone, nested.

    Raises:
        ConfigError: for one that is not of that form.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        _override(values, override)
    return values


def _override(values: dict[str, Any], override: str) -> str:
    """Write one ``key=value`` into nested values; its key."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, for example train.lr=3e-4")
    try:
        value = yaml.load(text, YamlLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML ({error})") from None
    set_override(values, key.split("."), value, override)
    return key


def find_recipe(recipe: str) -> Path:
    """The file of a recipe's name or path; a `ConfigError` names the nearest recipe, or all."""
    for path in (Path(recipe), RECIPES / f"{recipe}.yaml"):
        if path.is_file():
            return path
    known = sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.glob("*/*.yaml"))
    near = difflib.get_close_matches(recipe, known, 1)
    hint = f"did you mean {near[0]}?" if near else "known recipes: " + ", ".join(known)
    raise ConfigError(f"no recipe {recipe!r}: {hint}")


def trainings(scale: str) -> list[str]:
    """The recipes of a scale in the order in which they run: ``tiny`` -> ``tiny/understanding_clip``, ..."""
    return [f"{scale}/{name}" for name in TRAININGS if (RECIPES / scale / f"{name}.yaml").is_file()]


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a YAML file merged over those it extends; ``below`` are the files that extend this one."""
    if path.resolve() in below:
        raise ConfigError(f"{path}: extends itself, through {' and '.join(p.name for p in below)}")
    try:
        values = yaml.load(path.read_text(), YamlLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(values).__name__}")
    parents = values.pop("extends", [])
    merged: dict[str, Any] = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        beside = path.parent / f"{parent}.yaml"
        found = beside if beside.is_file() else find_recipe(str(parent))
        below_it = _read(found, (*below, path.resolve()))
        # One that comes later describes whole parts: half of one LLM and half of another would be neither.
        for part in ("llm", "understanding", "generation", "decoder"):
            if part in below_it.get("model", {}):
                merged.get("model", {}).pop(part, None)
        merged = merge(merged, below_it)
    return merge(merged, values)
