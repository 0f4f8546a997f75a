"""``pisces eval``: each command on a nano model, what it prints and leaves behind, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from open_pisces.cli.commands import main
from open_pisces.datasets.scenes.composer import Cutouts
from open_pisces.datasets.scenes.layout import vocabulary
from open_pisces.eval.scenes import diagnose, placement
from open_pisces.eval.scenes import frozen as frozen_scenes
from open_pisces.eval.scenes import vqa as scenes
from open_pisces.model.folder import WEIGHTS

Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def pisces(
    capsys: pytest.CaptureFixture[str], nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Run ``pisces eval ... --json`` in an empty folder: exit code, the object on the last line, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path, model: bool = True) -> tuple[int, dict[str, Any], str]:
        given = ["--model", str(nano_folder)] if model else []
        code = main(["eval", *(str(word) for word in words), *given, "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if code == 0 else {}, err

    return run


@pytest.fixture
def artwork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plates in place of the artwork."""
    styles = {s.style for p in ("drawing/train", "questions/train", "placement/train") for s in frozen_scenes.load(p)}
    pictures = {}
    for number, thing in enumerate((*vocabulary().objects, *vocabulary().shapes)):
        for place, style in enumerate(sorted(styles)):
            plate = Pillow.new("RGBA", (40, 40), (3 * number, 40 * place, 255 - 3 * number, 255))
            pictures[style, thing.concept, thing.colour if thing.is_shape else ""] = plate
    cutouts = Cutouts(pictures, {style: style for style in sorted(styles)})
    for module in (diagnose, placement, scenes):
        monkeypatch.setattr(module, "load_cutouts", lambda: cutouts)
    monkeypatch.setattr(diagnose, "PROBED", 60)


def test_scenes_and_placement_keep_runs_that_can_be_scored_again(pisces: Run, artwork: None) -> None:
    for words in (("scenes", "--limit", "6"), ("placement", "--limit", "9")):
        code, found, _ = pisces(*words)
        folder = Path(found["folder"])
        assert code == 0 and folder.parent == Path("runs/eval") and found["scenes"] == "v1"
        assert found["pictures_differ"] > 0  # plates are not the artwork
        first = (folder / "scores.json").read_bytes()
        _, again, _ = pisces(*words)  # nothing to do
        assert {**again, "seconds": 0} == {**found, "seconds": 0}
        code, rescored, _ = pisces("rescore", folder, model=True)
        assert code == 0 and rescored["score"] == found["score"] and (folder / "scores.json").read_bytes() == first


def test_two_runs_of_one_command_agree_to_the_byte(pisces: Run) -> None:
    files = []
    for name in ("one", "two"):
        code, found, _ = pisces("drawing", "--per-category", "1", "--out", name)
        assert found["baseline"] is None  # one caption of each category: no other to hold the pictures against
        assert code == 0 and found["n"] == 6 and found["others"]["scene judge (two-stage)"]["same_verdict"] >= 0
        folder = Path(name)
        files.append({p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()})
    assert files[0] == files[1] and len(files[0]) >= 6 * 2 + 6


def test_a_run_of_another_model_is_not_scored_under_this_one_s_name(pisces: Run) -> None:
    pisces("drawing", "--per-category", "1", "--out", "run")
    code, _, err = pisces("rescore", "run", "--model", WEIGHTS, model=False)
    assert code == 2 and "is a run of the model" in err and "evaluate that model" in err
    assert pisces("rescore", "run")[0] == 0
    (Path("run") / "detections-scene-judge-one-stage.jsonl").unlink()
    assert pisces("rescore", "run")[1]["detector"] == "scene judge (two-stage)"  # what has looked is what is scored
    for rows in Path("run").glob("detections-*.jsonl"):
        rows.unlink()
    code, _, err = pisces("rescore", "run")
    assert code == 2 and "has no detections yet" in err


def test_a_drawing_says_how_good_its_judges_are(pisces: Run) -> None:
    _, found, _ = pisces("drawing", "--per-category", "1", "--split", "pairs", "--out", "run")
    for judge in ("scene judge (one-stage)", "scene judge (two-stage)"):
        assert found["judges"][judge]["real scenes, train"]["class"] >= 0.97
        assert set(found["judges"][judge]["labelled drawings"]) == {"things", "class", "colour", "place"}
    assert found["split"] == "pairs" and found["missing"] == ["single_object", "counting", "colors", "color_attr"]


def test_diagnosis_and_report(pisces: Run, artwork: None) -> None:
    code, found, _ = pisces("diagnose", "--per-category", "1", "--out", "runs/eval/found")
    assert code == 0 and Path(found["png"]).is_file() and found["sentence"].startswith("The largest loss")
    pisces("drawing", "--per-category", "1", "--out", "runs/eval/drawn")
    code, told, _ = pisces("report", "runs/eval", "--out", "results.md", model=False)
    assert code == 0 and Path("results.md").is_file() and Path("results.json").is_file()
    text = Path("results.md").read_text()
    assert "0.55" in text and "SDXL" in text  # a published row
    assert len(told["own"]) >= 1


def test_a_gallery_and_galleries_side_by_side(pisces: Run) -> None:
    for name, scale in (("one", "1"), ("two", "2")):
        code, found, _ = pisces("gallery", "--out", name, "--guidance-scale", scale)
        assert code == 0 and Path(found["sheet"]).is_file()
    code, _, _ = pisces("gallery", "one", "two", "--compare", "both.png")
    with Pillow.open("both.png") as both, Pillow.open("one/sheet.png") as one:
        assert code == 0 and both.height > 300 and both.width > 300 and one.width > 300


def test_geneval_on_pictures_that_are_there(pisces: Run, tmp_path: Path) -> None:
    rows = [{"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"}]
    rows += [{"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}],
              "prompt": "two dogs"}]  # fmt: skip
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, drawn, _ = pisces("geneval", "--prompts", "prompts.jsonl", "--detector", "judge", "--n", "2", "--out", "run")
    assert code == 0 and drawn["n"] == 4 and set(drawn["categories"]) == {"single_object", "counting"}
    code, scored, _ = pisces("geneval", "--images", "run/images", "--detector", "judge", "--n", "2", model=False)
    assert code == 0 and scored["score"] == drawn["score"]
    code, _, err = pisces("geneval", "--images", "run/images", "--detector", "judge", "--n", "4", model=False)
    assert code == 2 and "2 pictures, expected are 4" in err
    code, _, _ = pisces("export", "run", "--layout", "wise", "--out", "away", model=False)
    assert code == 2 and not Path("away").exists()
    code, _, _ = pisces("export", "run", "--layout", "geneval", "--out", "away", "--part", model=False)
    assert code == 0 and any(Path("away").rglob("*.png"))


def test_another_benchmark_s_prompts_are_drawn_and_laid_out(pisces: Run) -> None:
    rows = [{"Prompt": f"a {word}", "prompt_id": number} for number, word in ((2, "dog"), (1, "cat"))]
    Path("wise.json").write_text(json.dumps(rows))
    code, drawn, _ = pisces("draw", "--layout", "wise", "--prompts", "wise.json", "--out", "run")
    assert code == 0 and drawn == {"folder": "run", "prompts": 2}
    code, _, err = pisces("export", "run", "--layout", "wise", "--out", "away", model=False)
    assert code == 2 and "2 prompts, wise has 1000" in err
    code, _, _ = pisces("export", "run", "--layout", "wise", "--out", "away", "--part", model=False)
    assert code == 0 and sorted(path.name for path in Path("away").iterdir()) == ["1.png", "2.png"]
    code, _, err = pisces("draw", "--layout", "dpg", "--prompts", "nowhere")
    assert code == 2 and "nowhere: not there" in err


def test_understanding_of_fixtures(pisces: Run) -> None:
    code, found, _ = pisces("understanding", "pope", "gqa", "--limit", "2", "--out", "und")
    assert code == 0 and set(found["rows"]) == {"pope", "gqa"}
    assert all({"score", "strict", "lenient", "n", "why"} <= set(row) for row in found["rows"].values())


def test_people_see_a_row_for_each_benchmark_and_what_there_is_to_say(
    pisces: Run, nano_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["eval", "understanding", "pope", "mm_vet", "--limit", "1", "--model", str(nano_folder)])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and sum("pope" in line and "│" in line for line in lines) == 1
    assert any("mm_vet" in line and "not run" in line for line in lines)
    assert any(line.startswith(("all: ", "mm_vet: ", "pope: ")) for line in lines)


def test_the_judges_card_and_people_s_output(capsys: pytest.CaptureFixture[str], pisces: Run) -> None:
    code, card, _ = pisces("judge", model=False)
    assert code == 0 and set(card) >= {"one-stage", "two-stage"}
    assert main(["eval", "judge"]) == 0 and "one-stage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["geneval"], "give --prompts"),
        (["geneval", "--prompts", "none.jsonl", "--detector", "judge"], "none.jsonl"),
        (["gallery", "one", "--compare", "both.png"], "needs two or more galleries"),
        (["gallery", "--prompts", "dreams"], "dreams"),
        (["rescore", "nowhere"], "no run folder"),
        (["understanding", "imagenet", "--limit", "1"], "imagenet"),
        (["drawing", "--per-category", "61"], "the frozen scenes hold 1 to 60"),
        (["scenes", "--limit", "1001"], "hold 1000 questions"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(pisces: Run, artwork: None, words: list[str], says: str) -> None:
    code, _, err = pisces(*words)
    line = err.strip().splitlines()[-1]
    assert code == 2 and line.startswith("pisces: ") and says in line
    assert not Path("runs").exists()
