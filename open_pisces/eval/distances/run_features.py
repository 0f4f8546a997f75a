"""Features that a run keeps, so that its distances can be repeated without the network that made them.

``features.safetensors`` in the run folder holds sets of pictures by name: ``NAME.rows`` of `Features`, or ``NAME.mean``
and ``NAME.scatter`` of `FeatureStatistics`. Its metadata says what measured them, and which pictures the run had then.
A picture takes 4 bytes for each feature, 8 kB with Inception.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from open_pisces.eval.distances.distances import FeatureStatistics, write_tensors
from open_pisces.eval.distances.features import Features, FeatureSpec
from open_pisces.eval.run import Row, RunError, RunFolder, digest


@dataclass(frozen=True)
class RunFeatures:
    """Features of a run's pictures and of those they are compared with."""

    rows: Mapping[str, Features]
    """By name; ``drawn`` are the model's."""
    statistics: Mapping[str, FeatureStatistics] = field(default_factory=dict)
    """Sets of which only the statistics are known."""
    facts: Row = field(default_factory=dict)
    """What else shapes the score: the side that pictures were cut to, whether a biased figure was allowed."""

    def save(self, run: RunFolder) -> None:
        """Write the file, whole or not at all."""
        tensors: dict[str, np.ndarray] = {}
        sets: dict[str, Row] = {}
        for name, one in self.rows.items():
            tensors[f"{name}.rows"] = one.rows
            sets[name] = {"ruler": asdict(one.ruler), "pictures": one.pictures, "sides": one.sides}
        for name, known in self.statistics.items():
            tensors |= {f"{name}.mean": known.mean, f"{name}.scatter": known.scatter}
            sets[name] = {"ruler": asdict(known.ruler), "pictures": known.pictures, "n": known.n}
        about = {"sets": sets, "facts": self.facts, "images": _images(run)}
        # One entry of metadata: safetensors writes several in any order, and equal features would be unequal files.
        write_tensors(_path(run), tensors, {"about": json.dumps(about)})

    @classmethod
    def made_with(cls, ruler: FeatureSpec, run: RunFolder) -> Mapping[str, Features]:
        """The sets that a run keeps, or none if they have to be measured anew: with this ruler, of these pictures."""
        try:
            rows = cls.load(run).rows
        except RunError:
            return {}
        return rows if "drawn" in rows and rows["drawn"].ruler == ruler else {}

    @classmethod
    def load(cls, run: RunFolder) -> RunFeatures:
        """Read what `save` wrote.

        Raises:
            RunError: if there is no such file, it is damaged, or it was made of other pictures than the run has.
        """
        path = _path(run)
        if not path.is_file():
            raise RunError(f"{path}: no such file; the command that began the run goes on with it")
        try:
            with safe_open(path, "np") as file:
                about = json.loads((file.metadata() or {})["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = cls(*_sets(tensors, about["sets"]), about["facts"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path}: cannot be read ({error}): delete it and run the command again") from None
        if about["images"] != _images(run):
            raise RunError(f"{path}: features of other pictures than the run's: run the command again")
        return found


def _sets(
    tensors: Mapping[str, np.ndarray], sets: Mapping[str, Row]
) -> tuple[dict[str, Features], dict[str, FeatureStatistics]]:
    """The two kinds of sets in a file."""
    rows: dict[str, Features] = {}
    statistics: dict[str, FeatureStatistics] = {}
    for name, facts in sets.items():
        ruler = FeatureSpec(**facts["ruler"])
        if "n" in facts:
            moments = (tensors[f"{name}.mean"], tensors[f"{name}.scatter"])
            statistics[name] = FeatureStatistics(facts["n"], *moments, ruler, facts["pictures"])
        else:
            least, greatest = facts["sides"]
            rows[name] = Features(tensors[f"{name}.rows"], ruler, facts["pictures"], (least, greatest))
    return rows, statistics


def _path(run: RunFolder) -> Path:
    return run.folder / "features.safetensors"


def _images(run: RunFolder) -> str:
    """What identifies a run's pictures: the digest of their checksums."""
    return digest(run.rows("images"))
