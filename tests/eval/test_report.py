"""The report: published figures as their sources print them, ours where they compare, nothing guessed."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from open_pisces.eval.drawing.prompts import CATEGORIES
from open_pisces.eval.drawing.rules import Rules
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.report import tables as module
from open_pisces.eval.report.formatting import small_tables, told
from open_pisces.eval.report.markdown import NOT_RUN, UNKNOWN, grid, to_markdown
from open_pisces.eval.report.tables import baselines, prompts_digest, report, run_folders
from open_pisces.eval.run import Manifest, RunError, RunFolder
from open_pisces.eval.understanding.benchmarks import benchmarks

TINY, OTHER = "a" * 64, "b" * 64
PROMPTS = [{"key": f"{i:05d}", "tag": "single_object", "include": [], "prompt": f"a photo of {i}"} for i in range(6)]


def score(value: float, n: int = 24, **more: Any) -> dict[str, Any]:
    return {"score": value, "low": value - 0.02, "high": value + 0.03, "n": n, **more}


def geneval_scores(value: float = 0.61, **more: Any) -> dict[str, Any]:
    """What `judged_run.score_run` writes."""
    categories = {tag: score(0.5 + place / 20) for place, tag in enumerate(CATEGORIES)}
    told = {"categories": categories, "detector": "Mask2Former (x) + CLIP (y)", "rules": asdict(Rules())}
    return score(value, **{"name": "geneval", **told, **more})


def understanding_scores(value: float | None, **more: Any) -> dict[str, Any]:
    """What `eval.understanding.score` writes."""
    found = score(value or 0.0) if value is not None else {"score": None, "low": None, "high": None, "n": 24}
    return {
        **found,
        "strict": value,
        "lenient": value,
        "maximum": 100.0,
        "data": "hub",
        "judge": None,
        "why": "",
        **more,
    }


def make(
    folder: Path,
    task: str,
    scores: Mapping[str, Any] | None,
    items: Sequence[Mapping[str, Any]] = PROMPTS,
    model: str = "weights/tiny",
    model_hash: str = TINY,
    **settings: Any,
) -> Path:
    """A run folder with scores."""
    manifest = Manifest(task, model, model_hash, settings, threads=1, versions={"torch": "2.13.0"})
    run = RunFolder.open(folder, manifest, [dict(item) for item in items])
    if scores is not None:
        run.write_scores(dict(scores))
    return folder


def questions(n: int) -> list[dict[str, str]]:
    return [{"key": f"{i:05d}"} for i in range(n)]


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes our few prompts for the official ones."""
    table = copy.deepcopy(baselines())
    table["official"]["geneval"] = prompts_digest(PROMPTS)
    monkeypatch.setattr(module, "baselines", lambda: table)


def row_of(table: Mapping[str, Any], model: str) -> dict[str, Any]:
    (row,) = (row for row in table["rows"] if row["model"] == model and row.get("here"))
    return row["figures"]


# -------------------------------------------------------------------------------------------------- published figures


def test_every_published_figure_has_a_model_a_column_a_source_and_a_certainty() -> None:
    table = baselines()
    rows = [row for group in table["rows"].values() for row in group]
    for row in rows:
        assert set(row) <= {"model", "source", "mark", "marks", "variant", "note", "figures"}, row
        assert row["model"] in table["models"] and row["source"] in table["sources"]
        assert {row["mark"], *row.get("marks", {}).values()} <= set(table["certainty"])
        assert row["figures"] and set(row.get("marks", {})) <= set(row["figures"]) <= set(table["columns"])
        assert all(isinstance(figure, float) for figure in row["figures"].values())
    used = {row["source"] for row in rows}
    assert used == set(table["sources"]) and {row["model"] for row in rows} == set(table["models"])
    assert all(source["cite"] and source["url"].startswith("https://") for source in table["sources"].values())
    assert {model["group"] for model in table["models"].values()} == set(table["groups"])


def test_tables_1a_and_1b_have_the_papers_24_columns_under_the_benchmarks_own_names() -> None:
    table = baselines()
    columns = table["tables"]["1a"]["columns"] + table["tables"]["1b"]["columns"]
    paper = {name for name, row in benchmarks().items() if row.column is not None}
    assert len(columns) == 24 and set(columns) == paper
    assert table["tables"]["2"]["columns"] == [*CATEGORIES, "overall"]


def test_rows_of_one_source_differ_in_model_or_variant_and_contradictions_stand_in_rows_of_their_own() -> None:
    for rows in baselines()["rows"].values():
        names = [(row["model"], row["source"], row.get("variant")) for row in rows]
        assert len(set(names)) == len(names)
    overall = [(row["model"], row["figures"]["overall"]) for row in baselines()["rows"]["geneval"]]
    for model, figures in {"show_o": [0.53, 0.68], "emu3_gen": [0.54, 0.66], "seed_x": [0.49, 0.51]}.items():
        assert [figure for name, figure in overall if name == model] == figures


def test_overall_scores_of_geneval_are_the_means_of_their_categories() -> None:
    # GenEval's rule: the overall score is the unweighted mean of the six; sources round to two digits.
    whole = [row for row in baselines()["rows"]["geneval"] if len(row["figures"]) == 7]
    assert len(whole) == 18
    for row in whole:
        mean = sum(row["figures"][tag] for tag in CATEGORIES) / 6
        assert row["figures"]["overall"] == pytest.approx(mean, abs=0.01), row["model"]


def test_the_papers_own_row_holds_what_was_recovered_and_nothing_else() -> None:
    (row,) = (row for row in baselines()["rows"]["understanding"] if row["model"] == "pisces")
    assert row["figures"] == {
        **{"vqav2": 82.1, "gqa": 64.8, "mmbench_en": 73.9, "pope": 86.3, "mm_vet": 50.0, "mme_perception": 1582.8},
        **{"mme_cognition": 324.3, "mmmu": 41.2, "realworldqa": 63.0, "textvqa": 66.2},
    }
    # The paper's text: 26.3 % above EMU3's 58.5, 8.6 % above SEED-X's 1457.0, 34.4 % above EMU3's 37.2.
    confirmed = {"mmbench_en": 1.263 * 58.5, "mme_perception": 1.086 * 1457.0, "mm_vet": 1.344 * 37.2}
    assert row["marks"] == dict.fromkeys(confirmed, "X")
    assert all(row["figures"][name] == pytest.approx(value, rel=5e-4) for name, value in confirmed.items())
    assert "pisces" not in [row["model"] for row in baselines()["rows"]["geneval"]]


@pytest.mark.skipif("PISCES_GENEVAL" not in os.environ, reason="PISCES_GENEVAL names no folder")
def test_the_official_prompts_are_known_in_any_order_and_under_any_keys() -> None:
    path = Path(os.environ["PISCES_GENEVAL"]) / "evaluation_metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keyed = [{"key": f"x{place}", **row} for place, row in enumerate(reversed(rows))]
    assert len(rows) == 553 and prompts_digest(keyed) == baselines()["official"]["geneval"]
    changed = [{**keyed[0], "prompt": "a photo of something else"}, *keyed[1:]]
    assert prompts_digest(changed) != baselines()["official"]["geneval"] != prompts_digest(keyed[1:])


# ----------------------------------------------------------------------------------------------- beside, or on its own


def test_without_runs_every_cell_of_ours_is_not_run() -> None:
    found = report([])
    for key in ("1a", "1b", "2", "fid"):
        table = found["tables"][key]
        assert row_of(table, "open_pisces") == dict.fromkeys(table["columns"], NOT_RUN) and not table["runs"]
    assert not found["own"] and not any(row.get("here") for row in found["tables"]["4"]["rows"])


@pytest.mark.usefixtures("official")
def test_official_geneval_stands_in_table_2(tmp_path: Path) -> None:
    found = report([make(tmp_path / "run", "geneval", geneval_scores(), n=4, seed=42)])
    figures = row_of(found["tables"]["2"], "tiny")
    assert figures["overall"] == {"score": 0.61, "low": 0.59, "high": 0.64} and figures["position"]["score"] == 0.7
    assert not found["own"]
    (run,) = found["tables"]["2"]["runs"]
    assert run["told"]["detector"] == "Mask2Former (x) + CLIP (y)" and run["told"]["rules"] == "official"
    assert run["settings"] == {"n": 4, "seed": 42} and run["versions"] == {"torch": "2.13.0"}


@pytest.mark.parametrize(
    ("items", "n", "more", "why"),
    [
        (PROMPTS[:5], 4, {}, "5 prompts that are not the 553 official ones"),
        ([{**PROMPTS[0], "prompt": "a cat"}, *PROMPTS[1:]], 4, {}, "6 prompts that are not"),
        (PROMPTS, 1, {}, "1 pictures of each prompt, not 4"),
        (PROMPTS, 4, {"rules": {**asdict(Rules()), "counting_threshold": 0.5}}, "rules that are not the official"),
        (PROMPTS, 4, {"rules": None}, "rules that are not the official"),
    ],
)
@pytest.mark.usefixtures("official")
def test_geneval_on_anything_else_stands_apart(
    tmp_path: Path, items: list[dict[str, Any]], n: int, more: dict[str, Any], why: str
) -> None:
    found = report([make(tmp_path / "run", "geneval", geneval_scores(**more), items, n=n)])
    assert set(row_of(found["tables"]["2"], "tiny").values()) == {NOT_RUN}
    (row,) = found["own"]
    assert why in row["aside"] and row["score"] == 0.61 and row["measure"] == "geneval"


def test_the_few_prompts_of_these_tests_are_not_the_official_ones(tmp_path: Path) -> None:
    found = report([make(tmp_path / "run", "geneval", geneval_scores(), n=4)])
    assert [row["aside"] for row in found["own"]] == ["6 prompts that are not the 553 official ones"]


def test_a_benchmark_stands_in_its_column_if_its_whole_split_was_asked(tmp_path: Path) -> None:
    size = benchmarks()["llava_w"].size
    whole = make(tmp_path / "a", "understanding/llava_w", understanding_scores(51.0), questions(size))
    found = report([whole, make(tmp_path / "b", "understanding/ai2d", understanding_scores(31.0), questions(3088))])
    assert row_of(found["tables"]["1a"], "tiny")["llava_w"]["score"] == 51.0
    assert row_of(found["tables"]["1b"], "tiny")["ai2d"]["score"] == 31.0
    assert row_of(found["tables"]["1a"], "tiny")["pope"] == NOT_RUN
    assert [len(found["tables"][key]["runs"]) for key in ("1a", "1b", "2")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("task", "n", "more", "why"),
    [
        ("understanding/llava_w", 59, {}, "59 questions, the whole split has 60"),
        ("understanding/llava_w", 60, {"data": "fixtures"}, "60 made-up questions"),
        ("understanding/chartqa", 2500, {}, "no column of the paper"),
        ("understanding/other", 5, {}, "no column of the paper"),
        ("scenes/vqa", 5, {}, "nothing like it is published"),
        ("fid", 5, {"protocol": "own"}, "not the COCO-30K protocol"),
    ],
)
def test_what_compares_with_nothing_stands_apart(
    tmp_path: Path, task: str, n: int, more: dict[str, Any], why: str
) -> None:
    found = report([make(tmp_path / "run", task, understanding_scores(40.0, **more), questions(n))])
    assert [why in row["aside"] for row in found["own"]] == [True]
    assert all(set(row_of(found["tables"][key], "tiny").values()) == {NOT_RUN} for key in ("1a", "1b", "2", "fid"))


def test_a_column_whose_judge_is_missing_is_not_run_and_says_why(tmp_path: Path) -> None:
    scores = understanding_scores(None, why="needs a judge: none was named")
    found = report([make(tmp_path / "run", "understanding/mm_vet", scores, questions(218))])
    assert row_of(found["tables"]["1a"], "tiny")["mm_vet"] == NOT_RUN
    assert "`understanding/mm_vet`" in to_markdown(found) and "needs a judge: none was named" in to_markdown(found)


def test_a_whole_fid_stands_in_its_table(tmp_path: Path) -> None:
    scores = {**score(31.5), "name": "FID", "protocol": "COCO-30K"}
    found = report([make(tmp_path / "run", "fid", scores, questions(3))])
    assert row_of(found["tables"]["fid"], "tiny") == {"fid": {"score": 31.5, "low": 31.48, "high": 31.53}}


# --------------------------------------------------------------------------------------------------------- several runs


def test_each_model_has_a_row_of_its_own_and_a_moved_one_is_still_the_same(tmp_path: Path) -> None:
    make(tmp_path / "runs" / "1", "scenes/vqa", score(0.8), questions(2))
    make(tmp_path / "runs" / "2", "scenes/vqa", score(0.7), questions(3), model="elsewhere/tiny")
    make(tmp_path / "runs" / "3", "scenes/vqa", score(0.6), questions(2), model="8b/model", model_hash=OTHER)
    found = report([tmp_path / "runs"])
    assert found["models"] == {"tiny": TINY, "8b": OTHER}
    assert [(row["model"], row["score"]) for row in found["own"]] == [("tiny", 0.8), ("tiny", 0.7), ("8b", 0.6)]
    assert [row["model"] for row in found["tables"]["2"]["rows"] if row.get("here")] == ["tiny", "8b"]


@pytest.mark.parametrize("place", ["weights/tiny", "./weights/tiny"])
def test_other_weights_under_one_name_are_refused(tmp_path: Path, place: str) -> None:
    make(tmp_path / "a", "scenes/vqa", score(0.8), questions(2))
    make(tmp_path / "b", "scenes/vqa", score(0.7), questions(2), model=place, model_hash=OTHER)
    with pytest.raises(RunError, match=r"a and .*b are of other weights under one name, tiny \(a{12} and b{12}\)"):
        report([tmp_path])


@pytest.mark.usefixtures("official")
def test_two_runs_for_one_cell_are_refused(tmp_path: Path) -> None:
    for seed in (0, 1):
        make(tmp_path / f"seed{seed}", "geneval", geneval_scores(), n=4, seed=seed)
    with pytest.raises(EvaluationError, match="seed0 and .*seed1 both give single_object of tiny: report one"):
        report([tmp_path])
    assert len(report([tmp_path / "seed0", tmp_path / "seed0", tmp_path / "." / "seed0"])["tables"]["2"]["runs"]) == 1


def test_scores_of_another_model_or_manifest_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "run", "scenes/vqa", score(0.8), questions(2)) / "scores.json"
    scores = json.loads(path.read_text())
    for name, value, words in (("model_hash", OTHER, "scores of the model b{12}"), ("run", "0", "another manifest")):
        path.write_text(json.dumps({**scores, name: value}))
        with pytest.raises(RunError, match=words):
            report([tmp_path])


def test_runs_without_scores_are_named_in_a_tree_and_refused_when_asked_for(tmp_path: Path) -> None:
    half = make(tmp_path / "runs" / "half", "scenes/vqa", None, questions(2))
    make(tmp_path / "runs" / "whole", "scenes/vqa", score(0.8), questions(2))
    make(tmp_path / "runs" / "gallery", "gallery", None, questions(2))
    found = report([tmp_path / "runs"])
    assert found["unfinished"] == [str(half)] and len(found["own"]) == 1
    assert f"- {half}" in to_markdown(found)
    with pytest.raises(RunError, match="half has no scores yet"):
        report([half])


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")  # of something else: no items lie beside it
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunError, match="no run folder, and none in it"):
            list(run_folders(path))


# ------------------------------------------------------------------------------------------------------------- written


@pytest.fixture
def written(tmp_path: Path, official: None) -> tuple[dict[str, Any], str]:
    """A report of several runs, and its Markdown as written."""
    make(tmp_path / "runs/a", "geneval", geneval_scores(spread={"deviation": 0.008}), n=4, steps=None, weights="/a/b")
    make(tmp_path / "runs/b", "geneval", geneval_scores(0.4, detector="judge (x)"), PROMPTS[:2], n=4)
    make(tmp_path / "runs/c", "understanding/llava_w", understanding_scores(51.0, command="pisces eval"), questions(60))
    make(
        tmp_path / "runs/d",
        "understanding/gqa",
        understanding_scores(20.0, baseline=0.0, data="fixtures"),
        questions(4),
    )
    found = report([tmp_path / "runs"], tmp_path / "results.md")
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md", "runs"]
    return found, (tmp_path / "results.md").read_text()


def blocks(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text, as cells."""
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    return [[[cell.strip() for cell in line[1:-1].split(" | ")] for line in table] for table in tables]


def test_tables_are_aligned_in_source_and_whole_when_rendered(written: tuple[dict[str, Any], str]) -> None:
    tables = [part.splitlines() for part in written[1].split("\n\n") if part.startswith("|")]
    assert len(tables) == 6 + 2  # measures, five of the paper; categories of two runs
    assert all(len({len(line) for line in table}) == 1 for table in tables)
    for table in blocks(written[1]):
        assert len({len(row) for row in table}) == 1 and set("".join(table[1])) == {"-", ":"}


def test_cells_are_figures_of_a_source_or_of_a_run_or_empty(written: tuple[dict[str, Any], str]) -> None:
    found, text = written
    published = [cells for cells in blocks(text) if cells[0][0] == "model"]
    for table, cells in zip(found["tables"].values(), published, strict=True):
        printed = iter(row for row in cells[2:] if not row[0].startswith("**"))
        for row in table["rows"]:
            line = next(printed)[2:-1]
            for column, cell in zip(table["columns"], line, strict=True):
                figure = row["figures"].get(column)
                if figure is None:
                    assert cell == UNKNOWN and not row.get("here")
                elif figure == NOT_RUN:
                    assert cell == NOT_RUN and row["here"]
                else:
                    value = figure["score"] if row.get("here") else figure
                    assert float(cell.split(" ")[0]) == pytest.approx(value, abs=0.051 if value > 1.5 else 0.0051)
        assert next(printed, None) is None


def test_rows_name_their_sources_and_marks(written: tuple[dict[str, Any], str]) -> None:
    cells = [row for table in blocks(written[1]) for row in table]
    assert ["Show-o (first report)", "1.3B", "0.95", "0.52", "0.49", "0.82", "0.11", "0.28", "0.53", "[1]"] in cells
    (pisces,) = (row for row in cells if row[0].startswith("Pisces") and "82.1" in row)
    assert [cell for cell in pisces if "(X)" in cell] == ["73.9 (X)", "50.0 (X)", "1582.8 (X)"]
    assert "- [1] Janus, Table 3 (arXiv 2410.13848): <https://arxiv.org/abs/2410.13848>" in written[1]
    assert "- Janus [2]: this row mixes in figures of Janus-Pro-1B." in written[1]
    here = [row for row in cells if row[0] == "tiny" and "0.61" in row]
    assert here == [["tiny", "", "0.50", "0.55", "0.60", "0.65", "0.70", "0.75", "0.61", "here"]]


def test_figures_of_ours_are_told_with_all_they_depend_on(written: tuple[dict[str, Any], str]) -> None:
    found, text = written
    (line,) = (line for line in text.splitlines() if "`geneval`, run" in line and "Settings: n 4, steps" in line)
    (scores,) = (table for table in blocks(text) if table[-1][-1] == "0.61 [0.59, 0.64]")
    assert scores[0] == ["", *(tag.replace("_", " ") for tag in CATEGORIES), "overall"] and scores[2][0] == "scores"
    assert ": 0.61 [0.59, 0.64]. n 24" in line and "detector Mask2Former (x) + CLIP (y)" in line
    assert "spread (deviation 0.008)" in line and "Settings: n 4, steps the model's own, weights .../b" in line
    assert found["tables"]["2"]["runs"][0]["run"][:8] in line
    assert "torch 2.13.0; device cpu, threads 1" in text and "command pisces eval" in text


def test_measures_of_our_own_stand_in_a_table_of_their_own(written: tuple[dict[str, Any], str]) -> None:
    own = blocks(written[1])[0]
    runs = [row["run"][:8] for row in written[0]["own"]]
    why = ["2 prompts that are not the 553 official ones", "4 made-up questions, none of the benchmark's"]
    assert own[2:] == [
        ["`geneval`", "tiny", "0.4", "0.38 to 0.43", "", "24", f"`{runs[0]}`", why[0]],
        ["`understanding/gqa`", "tiny", "20 of 100", "19.98 to 20.03", "0", "24", f"`{runs[1]}`", why[1]],
    ]


JUDGED = [f"judges: scene judge (one-stage): {pictures}" for pictures in ("real scenes, train", "labelled drawings")]


def test_a_score_by_judges_is_told_with_what_the_judges_were_measured_at(tmp_path: Path) -> None:
    judges = {"scene judge (one-stage)": {"real scenes, train": {"class": 0.981}, "labelled drawings": {"class": 0.93}}}
    more = {
        "name": "scenes/drawing",
        "judges": judges,
        "scenes": "v1",
        "agreement": {"two-stage": 0.96},
        "why": "small.",
    }
    folder = make(tmp_path / "run", "scenes/drawing", geneval_scores(0.31, **more), scenes="v1", n=1)
    text = to_markdown(report([folder]))
    (line,) = (line for line in text.splitlines() if line.startswith("**tiny**"))
    assert "run `" in line and ": 0.31 [0.29, 0.34]. " in line
    assert "agreement (two-stage 0.96)" in line and line.endswith("Settings: n 1. small.")
    scores, measured = (table for table in blocks(text) if table[2][0] in ("scores", JUDGED[0]))
    assert scores[0][1] == "single object" and scores[2][1] == "0.5 [0.48, 0.53]"
    assert measured == [["", "class"], measured[1], [JUDGED[0], "0.981"], [JUDGED[1], "0.93"]]


def test_long_hashes_are_shortened_and_long_tellings_cut(tmp_path: Path) -> None:
    more = {"of": 60, "details": {"hash": "0123456789abcdef" * 4, "list": list(range(1000, 1500))}}
    folder = make(tmp_path / "run", "scenes/vqa", score(0.5, **more), questions(2))
    text = to_markdown(report([folder]))
    (line,) = (line for line in text.splitlines() if line.startswith("**tiny**"))
    (details,) = (table[2] for table in blocks(text) if table[0] == ["", "hash", "list"])
    assert "n 24 of 60" in line and details[:2] == ["details", "0123456789ab"]
    assert details[2].startswith("(1,000, 1,001") and details[2].endswith("...") and "1,499" not in text


def test_no_place_of_the_machine_is_told(tmp_path: Path) -> None:
    place = str(tmp_path / "models" / "tiny")
    scores = understanding_scores(20.0, data=str(tmp_path / "copies"), judges=[{"at": str(tmp_path / "judge")}])
    folder = make(tmp_path / "run", "understanding/gqa", scores, questions(4), model=place, real=str(tmp_path / "coco"))
    report([folder], tmp_path / "results.md")
    for name in ("results.md", "results.json"):
        text = (tmp_path / name).read_text()
        assert str(tmp_path) not in text and ".../coco" in text and ".../copies" in text and ".../judge" in text


def test_nested_values_become_tables_without_empty_cells_and_short_ones_stay_in_the_line() -> None:
    judges = {name: {"real scenes": {"class": 0.9, "colour": 1.0}, "note": "x" * 60} for name in ("one_stage", "b")}
    losses = {"decoder": {"score": 0.5, "low": 0.25, "high": 0.75, "n": 1000}, "free": {"score": 0.125, "n": 7}}
    short, tables = small_tables(
        {
            "n": 3,
            "margin": {"score": 0.5, "low": 0.4, "high": 0.6},
            "few": {"a": None},
            "judges": judges,
            "losses": losses,
        }
    )
    assert {key: told(value) for key, value in short.items()} == {
        **{"n": "3", "margin": "0.5 [0.4, 0.6]", "few": "(a none)"},
        "losses": "(decoder (score 0.5, low 0.25, high 0.75, n 1,000), free (score 0.125, n 7))",
    }
    assert tables == [
        (["", "note"], [["judges: one stage", "x" * 60], ["judges: b", "x" * 60]]),
        (["", "class", "colour"], [[f"judges: {name}: real scenes", "0.9", "1"] for name in ("one stage", "b")]),
    ]
    _, (table,) = small_tables({"losses": {**losses, "true": losses["free"]}})
    assert table[0] == ["", "score", "n"] and table[1][0] == ["losses: decoder", "0.5 [0.25, 0.75]", "1,000"]
    assert all(len(row) == len(header) for header, rows in [*tables, table] for row in rows)


def test_a_grid_escapes_what_would_break_it() -> None:
    assert grid(["a", "b"], [["x|y", "1"], ["", "22"]], "lr").splitlines() == [
        "| a    |   b |",
        "| ---- | --: |",
        "| x\\|y |   1 |",
        "|      |  22 |",
    ]
