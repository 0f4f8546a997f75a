"""What changed between a run and its continuation: told, or refused where it changes the order of the data."""

from __future__ import annotations

from typing import Any

import yaml

from open_pisces.config import RunConfig
from open_pisces.data.order import Mixture
from open_pisces.settings import ConfigError

UNTOLD = ("out", "device", "name", "train.reorder")
"""Settings that change nothing that is learnt."""


def order_of(config: RunConfig, mixture: Mixture) -> dict[str, Any]:
    """What the order of the samples is a function of; kept in each checkpoint."""
    return {
        "seed": config.seed,
        "train.batch_size": config.train.batch_size,
        "data.lanes": config.data.lanes,
        "data.window": config.data.window,
        "data.sources": [source.model_dump(mode="json") for source in config.data.sources],
        "contents of the data": [reader.digest for reader in mixture.readers],
    }


def check_order(config: RunConfig, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of the order changed since a checkpoint, in words; nothing for one that does not say.

    Raises:
        ConfigError: if anything did, without the consent of ``train.reorder``.
    """
    changed = [_told(name, before[name], now[name]) for name in now if name in before and before[name] != now[name]]
    if changed and not config.train.reorder:
        raise ConfigError(
            f"{config.folder}: the samples of this run would come in another order: {'; '.join(changed)}. Set it back, "
            "choose another out=FOLDER, or consent with train.reorder=true"
        )
    return changed


def changed_settings(config: RunConfig) -> list[str]:
    """Settings that differ from those in the run folder's ``config.yaml``, in words."""
    written = config.folder / "config.yaml"
    if not written.is_file():
        return []
    before = _flat(yaml.safe_load(written.read_text()) or {})
    now = _flat(config.model_dump(mode="json"))
    names = sorted({*before, *now} - set(UNTOLD))
    return [_told(name, before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _told(name: str, before: Any, now: Any) -> str:
    shown = [text if len(text) <= 60 else f"{text[:57]}..." for text in (str(before), str(now))]
    return f"{name} was {shown[0]}, is {shown[1]}" if shown[0] != shown[1] else f"{name} changed"
