"""The lab: files say what is compared, runs go on where they stopped, and conclusions are those of the numbers."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from open_pisces.cli.commands import main
from open_pisces.config import RunConfig
from open_pisces.datasets.scenes.composer import Cutouts
from open_pisces.datasets.scenes.layout import vocabulary
from open_pisces.lab import run as lab_run
from open_pisces.lab.analysis import compare_paired, verdict_of
from open_pisces.lab.experiment import (
    Comparison,
    LabError,
    budget_of,
    config_of,
    load_experiment,
    names,
    planned_runs,
)
from open_pisces.lab.measures import confidence
from open_pisces.lab.report import write_report
from open_pisces.lab.run import Lab, results

SEEDS = {"synergy": 6, "encoders": 6, "captions": 3, "heads": 3, "tokens": 3}


def drawings() -> Cutouts:
    """Plates in place of the artwork."""
    pictures = {}
    for number, thing in enumerate((*vocabulary().objects, *vocabulary().shapes)):
        plate = Image.new("RGBA", (40, 40), (3 * number, 120, 255 - 3 * number, 255))
        for style in ("noto", "twemoji"):
            pictures[style, thing.concept, thing.colour if thing.is_shape else ""] = plate
    return Cutouts(pictures, {"noto": "", "twemoji": "twemoji"})


# ------------------------------------------------------------------------------------------------------ conclusions


def test_a_paired_comparison_is_the_paired_t_test() -> None:
    better = [0.50, 0.61, 0.55, 0.58, 0.49, 0.60]
    worse = [0.45, 0.52, 0.54, 0.50, 0.47, 0.51]
    found = compare_paired(better, worse, "drawing")
    apart = np.subtract(better, worse)
    t = apart.mean() / (apart.std(ddof=1) / 6**0.5)
    assert found.difference == pytest.approx(apart.mean()) and found.effect == pytest.approx(t / 6**0.5)
    # Student's table: t of 5 degrees of freedom for 95 % is 2.571, for 99 % 4.032.
    half = 2.571 * apart.std(ddof=1) / 6**0.5
    assert found.low == pytest.approx(apart.mean() - half, abs=1e-4)
    assert found.high == pytest.approx(apart.mean() + half, abs=1e-4)
    assert (0.01 < found.p < 0.05) == (2.571 < t < 4.032) and found.verdict == "agrees" and found.seeds == 6


def test_less_is_better_for_losses() -> None:
    lower, higher = [0.10, 0.12, 0.11], [0.20, 0.23, 0.21]
    assert compare_paired(lower, higher, "vector_error").verdict == "agrees"
    assert compare_paired(higher, lower, "vector_error").verdict == "disagrees"
    assert compare_paired(higher, lower, "vector_error").difference < 0
    assert compare_paired([0.1, 0.4, 0.2], [0.3, 0.1, 0.25], "answer_loss").verdict == "cannot tell"


def test_equal_runs_say_nothing_and_one_seed_is_refused() -> None:
    same = compare_paired([0.3, 0.4], [0.3, 0.4], "drawing")
    assert (same.difference, same.effect, same.p, same.verdict) == (0.0, None, 1.0, "cannot tell")
    with pytest.raises(LabError, match="two seeds or more"):
        compare_paired([0.3], [0.2], "drawing")


def test_a_claim_agrees_only_if_all_of_it_does() -> None:
    comparison = Comparison(metric="drawing", better="a", worse="b", matched="samples")
    yes = compare_paired([0.9, 0.91, 0.92], [0.1, 0.12, 0.1], "drawing")
    no, open_ = replace(yes, verdict="disagrees"), replace(yes, verdict="cannot tell")
    for found, verdict in (
        ((yes, yes), "agrees"), ((yes, open_), "cannot tell"), ((no, open_), "disagrees"),
        ((yes, no), "cannot tell"), ((open_, open_), "cannot tell"),
    ):  # fmt: skip
        assert verdict_of([(comparison, one) for one in found]) == verdict
    other = comparison.model_copy(update={"matched": "tokens"})
    assert verdict_of([(comparison, yes), (other, yes)]) == "agrees"
    mixed = [(comparison, yes), (other, no), (other, open_)]
    assert verdict_of(mixed) == "agrees with samples matched, disagrees with tokens matched"


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", names())
def test_every_experiment_has_budgets_and_valid_trainings(name: str, tmp_path: Path) -> None:
    experiment = load_experiment(name)
    assert set(experiment.budgets) >= {"smoke", "cpu", "gpu"}
    assert experiment.budgets["cpu"].seeds >= SEEDS[name]
    for budget in experiment.budgets.values():
        seen = {run.name for run in planned_runs(experiment, budget)}
        assert len(seen) == budget.seeds * len(experiment.variants)
        for variant in experiment.variants:
            config = config_of(experiment, budget, variant, 3, 640, "runs/x/model", tmp_path)
            assert config.seed == 3 and config.train.steps == round(640 / budget.batch_size)
            assert config.model.start == "runs/x/model" and config.data.sources[0].path == budget.data


def test_what_an_experiment_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no experiment 'synergie': choose .*synergy"):
        load_experiment("synergie")
    with pytest.raises(LabError, match="no budget 'tpu': choose smoke, cpu, gpu"):
        budget_of(load_experiment("heads"), "tpu")
    own = tmp_path / "own.yaml"
    text = load_experiment("heads").model_dump()
    text["comparisons"][0]["better"] = "nothing"
    own.write_text(json.dumps(text))
    with pytest.raises(LabError, match="no variant 'nothing'; it has flow, squared_error"):
        load_experiment(str(own))


# ------------------------------------------------------------------------------------------------------------- runs


VERDICTS = ("agrees", "disagrees", "cannot tell")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lab_run, "load_cutouts", drawings)
    monkeypatch.setenv("PISCES_DATA", str(tmp_path / "data"))


def test_the_smoke_budget_runs_to_a_page_and_goes_on_where_it_stopped(
    world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = load_experiment("heads")
    budget = budget_of(experiment, "smoke")
    lab = Lab("heads", experiment, "smoke", budget, tmp_path / "lab")
    honest = lab._one
    done: list[str] = []

    def stop_at_the_third(run: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        honest(run)
        done.append(run.name)

    monkeypatch.setattr(lab, "_one", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        lab.run(lambda line: None)
    assert done == ["squared_error/seed0", "flow/seed0"] and not (lab.folder / "results.json").exists()
    with pytest.raises(LabError, match=r"squared_error/seed1 was not done"):
        lab.conclude()
    before = [(lab.folder / name / "measured.json").read_text() for name in done]
    assert main(["lab", "heads", "--budget", "smoke", "--out", str(tmp_path / "lab")]) == 0
    out = capsys.readouterr().out
    assert "flow/seed0" not in out and "flow/seed1 (4 of 4)" in out
    assert [(lab.folder / name / "measured.json").read_text() for name in done] == before
    found = json.loads((lab.folder / "results.json").read_text())
    assert [(row["variant"], row["seed"]) for row in found["runs"]] == [
        ("squared_error", 0), ("flow", 0), ("squared_error", 1), ("flow", 1),
    ]  # fmt: skip
    for row in found["runs"]:
        assert row["samples"] == 64 and row["tokens"] > 64 * 20
        assert (
            0 <= row["questions"] <= 1 and abs(row["things"]) < 1 and row["answer_loss"] > 0 and row["vector_error"] > 0
        )
    assert found["runs"][0]["vector_error"] != found["runs"][2]["vector_error"]  # the seed matters
    assert write_report([tmp_path / "lab"], tmp_path / "docs" / "lab.md") == ["heads"]
    text = (tmp_path / "docs" / "lab.md").read_text()
    assert (
        "## heads\n" in text
        and "| [heads](#heads) | Not in the paper |" in text
        and "![heads](lab/heads.png)" in text
        and "| **flow**: " in text
    )
    with Image.open(tmp_path / "docs" / "lab" / "heads.png") as picture:
        assert picture.width > 400 and len(set(picture.convert("RGB").getdata())) > 20
    assert json.loads((tmp_path / "docs" / "lab" / "heads.json").read_text()) == found


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("captions", "synergy", "tokens")]


@pytest.mark.parametrize("name", ["encoders", *SLOW])
def test_the_smoke_budget_of_every_experiment_comes_to_a_verdict(world: None, tmp_path: Path, name: str) -> None:
    experiment = load_experiment(name)
    found = Lab(name, experiment, "smoke", budget_of(experiment, "smoke"), tmp_path / "lab").run(lambda line: None)
    assert all(any(one in part for one in VERDICTS) for part in found["verdict"].split(", "))
    assert len(found["runs"]) == 2 * len(experiment.variants)
    parts = sum(len({part.model_dump_json() for part in v.parts}) for v in experiment.variants.values())
    trained = list((tmp_path / "lab" / "parts").glob("*/training/model/decoder"))
    # Once for all seeds, and once for the variants that share it.
    assert len(trained) == (parts - 1 if name == "encoders" else parts)
    assert write_report([tmp_path / "lab"], tmp_path / "lab.md") == [name]


def test_a_training_that_a_signal_ended_is_not_measured(
    world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = load_experiment("heads")
    lab = Lab("heads", experiment, "smoke", budget_of(experiment, "smoke"), tmp_path)
    honest = lab_run.train

    def stopped(config: RunConfig, **how: Any) -> Path:
        def probe(*arguments: Any) -> None:
            signal.raise_signal(signal.SIGTERM)

        early = config.model_copy(update={"train": config.train.model_copy(update={"probe_every": 2})})
        return honest(early, probes=(probe,))

    monkeypatch.setattr(lab_run, "train", stopped)
    with pytest.raises(LabError, match=r"stopped in .*squared_error/seed0/training: the same command goes on"):
        lab.run(lambda line: None)
    assert not list(tmp_path.rglob("measured.json"))


def test_the_judges_confidence_in_what_was_asked_for_by_hand(tmp_path: Path) -> None:
    asked = {
        "a": [{"class": "cat", "count": 2}],
        "b": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}],
        "c": [{"class": "cat", "count": 2}],
    }
    seen = {
        "a": [("cat", 0.5), ("dog", 0.9), ("cat", 0.75), ("cat", 0.25)],
        "b": [("dog", 0.125), ("pig", 1.0)],
        "c": [("cat", 1.0)],
    }
    items = [json.dumps({"key": key, "include": include}) for key, include in asked.items()]
    (tmp_path / "items.jsonl").write_text("\n".join(items))
    rows = [
        json.dumps({"key": key, "pictures": [[{"class": name, "score": score} for name, score in found]]})
        for key, found in seen.items()
    ]
    (tmp_path / "detections-judge.jsonl").write_text("\n".join(rows))
    a = 0.5 - 0.9  # another caption asks for a dog, which stands in it, too
    dog, cat = 0.125, 0.0  # nothing else is asked for by others
    c = 0.0
    assert confidence(tmp_path) == pytest.approx((a + dog + cat + c) / 4)
    more = [json.dumps({"key": key, "include": [{"class": "pig", "count": 1}]}) for key in "de"]
    (tmp_path / "items.jsonl").write_text("\n".join([*items, *more]))
    # In b there is a pig, which two others ask for and none of its own; in a there is none, and one dog in three.
    a, dog, cat = 0.5 - 0.9 / 3, 0.125 - 1.0, -1.0
    assert confidence(tmp_path) == pytest.approx((a + dog + cat + c) / 4)


def test_a_folder_of_other_settings_is_refused_with_what_differs(tmp_path: Path) -> None:
    experiment = load_experiment("heads")
    budget = budget_of(experiment, "smoke")
    Lab("heads", experiment, "smoke", budget, tmp_path)
    Lab("heads", experiment, "smoke", budget, tmp_path)
    # More seeds go on with those that are there, and words change no training.
    Lab("heads", experiment.model_copy(update={"claim": "other"}), "smoke", budget, tmp_path)
    Lab("heads", experiment, "smoke", budget.model_copy(update={"seeds": 5}), tmp_path)
    with pytest.raises(LabError, match="holds runs of another budget"):
        Lab("heads", experiment, "smoke", budget.model_copy(update={"samples": 128}), tmp_path)
    with pytest.raises(LabError, match=r"holds runs of another world \(\"plain\", not \"many\"\)"):
        Lab("heads", experiment.model_copy(update={"world": "many"}), "smoke", budget, tmp_path)


def test_as_many_tokens_means_more_of_the_shorter_samples(world: None, tmp_path: Path) -> None:
    experiment = load_experiment("synergy")
    lab = Lab("synergy", experiment, "smoke", budget_of(experiment, "smoke"), tmp_path)
    both = lab._samples_of("both") * lab._tokens_of("both")
    for variant in ("understanding_long", "generation_long"):
        assert lab._samples_of(variant) * lab._tokens_of(variant) == pytest.approx(both)
    assert lab._samples_of("understanding") == 64 < lab._samples_of("understanding_long")
    assert lab._samples_of("understanding_long") < lab._samples_of("generation_long")


def test_results_are_conclusions_of_their_rows() -> None:
    experiment = load_experiment("heads")
    budget = budget_of(experiment, "smoke")
    rows = []
    for seed in range(3):
        for variant, score, error in (("squared_error", 0.6, 0.1), ("flow", 0.3, 0.3)):
            row = {"variant": variant, "seed": seed, "seconds": 60.0, "samples": 640, "tokens": 10_000}
            rows.append({**row, "things": score + seed / 100 * (variant == "flow"), "vector_error": error + seed / 50})
    rows[-1]["vector_error"] = 0.31
    found = results("heads", "smoke", experiment, budget, rows)
    assert found["verdict"] == "agrees" and found["seconds"] == 360
    assert [round(one["difference"], 3) for one in found["comparisons"]] == [0.29, 0.19]
