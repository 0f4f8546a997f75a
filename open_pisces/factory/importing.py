"""``pisces weights import``: a published model becomes a part of a model folder, with the settings that go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from open_pisces.config import ModelConfig
from open_pisces.data.tokenizer import load_tokenizer
from open_pisces.files import write_whole
from open_pisces.model.folder import read_card, write_folder
from open_pisces.model.importers.families import Family, families, settings_of
from open_pisces.model.importers.files import ImportSourceError
from open_pisces.model.importers.projector import fill_projector
from open_pisces.model.parts import build_part
from open_pisces.settings import merge, validate

SETTINGS = "model.yaml"
"""Beside the parts: what a recipe ``extends`` to train on them."""
PART = {
    "llm": "llm",
    "understanding": "understanding_encoder",
    "generation": "generation_encoder",
    "decoder": "decoder",
    "bridge": "bridge",
}
"""The part that each block of `ModelConfig` describes."""


NEIGHBORS = {
    "decoder": ("generation_encoder",),
    "bridge": ("generation_encoder", "understanding_encoder", "llm"),
}
"""Parts whose widths another one takes."""


def find_family(name: str) -> Family:
    """The family of that name.

    Raises:
        ImportSourceError: for one that is not known, with those that are.
    """
    if name not in families():
        raise ImportSourceError(f"no family {name!r}: choose {', '.join(families())}")
    return families()[name]


def import_weights(
    family: Family, source: str, folder: str | Path, overrides: dict[str, Any] | None = None
) -> ModelConfig:
    """Add a published model to a model folder as its part, and its settings to the folder's ``model.yaml``.

    Every tensor is accounted for before anything is written, and the folder is replaced as a whole. Run it once for
    each part; the generation encoder comes before the decoder, whose condition has its width.

    Args:
        family: of `families`.
        source: where it lies, or its hub name.
        folder: to write; it may hold other parts already.
        overrides: settings of the model that the source does not tell, such as ``{"generation": {"pool": 2}}``.

    Returns:
        The settings of the model so far.

    Raises:
        ImportSourceError: if the source is not what the family says, or does not fit the folder's other parts.
        ConfigError: for an override that is no setting.
    """
    folder = Path(folder)
    there = (folder / "config.json").is_file()
    before = read_card(folder)["model"] if there else {}
    part = PART[family.part]
    lacking = [name for name in NEIGHBORS.get(part, ()) if not (folder / name).is_dir()]
    if lacking:
        raise ImportSourceError(
            f"{folder}: holds no {lacking[0]}, and the {part}'s width follows from it: import that first"
        )
    own = merge(settings_of(family, source), overrides or {})
    config = validate(ModelConfig, {**before, **own}, {"": f"{source} ({family.name})"})
    tokenizer = load_tokenizer(config.tokenizer, config.template) if part == "llm" else None
    module = build_part(part, config, len(tokenizer) if tokenizer is not None else None)
    if part == "bridge":
        fill_projector(module, source)
    if part == "llm":
        # Its embeddings may have grown by our tokens: shapes on the meta device must know.
        grown = config.llm.config | {"vocab_size": module.config.vocab_size}
        config = config.model_copy(update={"llm": config.llm.model_copy(update={"config": grown})})
    licence = {"package": source, "version": "", "licence": family.licence, "attribution": family.example}
    record = {"name": f"import {family.name}", "steps": 0, "samples": 0, "seconds": 0.0, "device": "cpu"}
    record |= {"data": [], "licences": [licence]}
    write_folder(folder, config, {part: module}, tokenizer, start=folder if there else None, record=record)
    write_whole(folder / SETTINGS, as_recipe(folder))
    return config


def as_recipe(folder: Path) -> str:
    """The settings of a folder's parts as the beginning of a recipe: what differs from the defaults."""
    card = validate(ModelConfig, read_card(folder)["model"], {"": f"{folder}/config.json"})
    values = card.model_dump(mode="json", exclude_defaults=True)
    values.pop("tokenizer", None)  # the folder's
    head = f"# Written by `pisces weights import`; a recipe begins with `extends: {folder / SETTINGS}`.\n"
    return head + yaml.safe_dump({"model": {"start": str(folder), **values}}, sort_keys=False)
