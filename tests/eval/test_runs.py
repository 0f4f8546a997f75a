"""Run folders: begun, gone on with, refused; every file they write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL.Image import Image

from open_pisces.eval import run as runs
from open_pisces.eval.run import Manifest, RunError, RunFolder, digest, model_hash

ITEMS = [{"key": f"k{number}", "prompt": f"prompt {number}"} for number in range(7)]
SETTINGS = {"seed": 0, "guidance_scale": 1.5}


def manifest(**changed: Any) -> Manifest:
    """A manifest that does not depend on the machine."""
    plain = Manifest("scenes", "models/a", "f" * 64, dict(SETTINGS), threads=1, versions={"torch": "2.13.0"})
    return replace(plain, **changed)


def begin(folder: Path, items: Sequence[dict[str, Any]] = ITEMS, **changed: Any) -> RunFolder:
    return RunFolder.open(folder, manifest(**changed), items)


def answer(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a deterministic model says."""
    return [{"key": item["key"], "answer": item["prompt"].upper()} for item in items]


def picture(number: int, side: int = 8) -> Image:
    """A picture of noise of its own."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Pillow.fromarray(pixels)


def complete(run: RunFolder) -> RunFolder:
    """Draw and score everything that is not there."""
    for batch in run.batches("images", 3):
        run.save_images({item["key"]: [picture(int(item["key"][1:]))] for item in batch})
    for batch in run.batches("answers", 3):
        run.append("answers", answer(batch))
    run.write_scores({"score": 0.5})
    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------- begun, gone on with


def test_a_new_run_holds_what_is_asked(tmp_path: Path) -> None:
    run = begin(tmp_path / "a" / "run")
    assert sorted(files(run.folder)) == ["items.jsonl", "manifest.json"]
    assert run.items == ITEMS and run.manifest.items == digest(ITEMS)
    again = RunFolder.load(run.folder)
    assert (again.items, again.manifest, again.hash) == (run.items, run.manifest, run.hash)


def test_done_batches_are_not_done_again_and_half_done_ones_are_as_a_whole(tmp_path: Path) -> None:
    # Batches of 3 over 7 items: 0-2, 3-5, 6. The first is done, of the second one row is written.
    run = begin(tmp_path / "run")
    batches = list(run.batches("answers", 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    run.append("answers", answer(batches[0]))
    run.append("answers", answer(batches[1][:1]))
    left = [[item["key"] for item in batch] for batch in begin(run.folder).batches("answers", 3)]
    assert left == [["k3", "k4", "k5"], ["k6"]]


def test_a_row_written_twice_counts_as_last_written_and_rows_stand_in_the_order_of_the_items(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.append("answers", [{"key": "k3", "answer": "of the batch that was cut short"}])
    run.append("answers", answer(ITEMS[::-1]))
    assert run.rows("answers") == answer(ITEMS) and run.has("answers")


def test_rows_are_read_from_disk_once_until_some_are_added_or_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    whole = runs._read
    run = begin(tmp_path / "run")
    monkeypatch.setattr(runs, "_read", lambda path: read.append(path.name) or whole(path))
    assert not run.has("answers") and list(run.batches("answers", 7)) == [ITEMS] and read == ["answers.jsonl"]
    run.append("answers", answer(ITEMS))
    assert run.has("answers") and run.rows("answers") == run.written("answers") == answer(ITEMS)
    assert read == ["answers.jsonl"] * 2
    run.append("answers", [{"key": "k0", "answer": "again"}])
    assert len(run.written("answers")) == 8 and run.rows("answers")[0]["answer"] == "again"
    run.append("other", answer(ITEMS[:1]))
    assert len(run.written("answers")) == 8 and len(read) == 3  # of this name only
    run.drop("answers")
    assert not run.has("answers") and run.written("answers") == [] and len(read) == 4


def test_rows_that_are_missing_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.append("answers", answer(ITEMS[:2]))
    assert not run.has("answers")
    with pytest.raises(RunError, match=r"5 of 7 rows of answers.jsonl are missing \(the first: k2\).*goes on"):
        run.rows("answers")


@pytest.mark.parametrize("cut", [1, 9, 20])
def test_a_last_line_cut_short_is_dropped_and_mended(tmp_path: Path, cut: int) -> None:
    run = begin(tmp_path / "run")
    run.append("answers", answer(ITEMS))
    path = run.folder / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    (left,) = run.batches("answers", 3)
    assert [item["key"] for item in left] == ["k6"] and not run.has("answers")
    run.append("answers", answer(left))
    assert path.read_bytes() == whole


def test_a_line_cut_inside_a_letter_is_dropped_too(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.append("answers", [{"key": "k0", "answer": "é"}])
    path = run.folder / "answers.jsonl"
    path.write_bytes(path.read_bytes()[: -len('"}\n') - 1])  # é takes two bytes in UTF-8
    assert len(next(run.batches("answers", 3))) == 3
    run.append("answers", answer(ITEMS))
    assert run.rows("answers") == answer(ITEMS)


def test_interrupted_and_uninterrupted_runs_agree(tmp_path: Path) -> None:
    straight, broken = complete(begin(tmp_path / "a")), begin(tmp_path / "b")
    for done, batch in enumerate(broken.batches("images", 3)):
        if done == 1:
            break
        broken.save_images({item["key"]: [picture(int(item["key"][1:]))] for item in batch})
    broken = complete(begin(broken.folder))
    assert files(straight.folder) == files(broken.folder)


def test_two_runs_of_one_manifest_agree_byte_for_byte(tmp_path: Path) -> None:
    one, two = complete(begin(tmp_path / "a")), complete(begin(tmp_path / "b"))
    assert len(files(one.folder)) == 5 + 2 * 7  # manifest, items, images, answers, scores; a text and a picture an item
    assert files(one.folder) == files(two.folder) and one.hash == two.hash


def test_a_run_ended_before_its_manifest_was_written_begins_anew(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    (run.folder / "manifest.json").unlink()
    (run.folder / ".123-manifest.json").write_text("{")
    assert begin(run.folder).items == ITEMS


def test_tuples_in_settings_and_items_are_lists_from_the_start(tmp_path: Path) -> None:
    # A run that goes on reads lists; if the first one kept tuples, the two would be of different things.
    items = [{"key": "k0", "size": (8, 8)}]
    first = begin(tmp_path / "run", items, settings={"sizes": (64, 32)})
    second = begin(tmp_path / "run", items, settings={"sizes": (64, 32)})
    assert first.items == second.items == [{"key": "k0", "size": [8, 8]}]
    assert first.manifest == second.manifest and first.hash == second.hash


@pytest.mark.parametrize(
    "text", ["two\u2028lines", "two\u0085lines", "a\nb", "a\r\nb", "\x1c", "Größe 🐈", '{"key": 1}']
)
def test_texts_come_back_as_they_were(tmp_path: Path, text: str) -> None:
    items = [{"key": text, "prompt": text}, {"key": "other"}]
    run = begin(tmp_path / "run", items)
    run.append("answers", [{"key": item["key"], "answer": text} for item in items])
    run.save_images({text: [picture(0)], "other": [picture(1)]})
    run.write_scores({"note": text})
    again = begin(run.folder, items)
    assert again.items == items and again.rows("answers")[0] == {"key": text, "answer": text}
    assert again.scores()["note"] == text and len(again.images(text)) == 1


def test_without_a_folder_the_same_command_finds_its_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, again = (RunFolder.open(None, manifest(task="understanding/pope"), ITEMS) for _ in range(2))
    assert first.folder == again.folder and str(first.folder).startswith("runs/eval/understanding-pope-ffffffff-")
    moved = RunFolder.open(None, manifest(task="understanding/pope", model="elsewhere/a"), ITEMS)
    assert moved.folder == first.folder
    others = [{"settings": {"seed": 1}}, {"model_hash": "e" * 64}, {"threads": 2}, {"task": "scenes"}]
    folders = {
        RunFolder.open(None, manifest(**{"task": "understanding/pope", **other}), ITEMS).folder for other in others
    }
    assert len(folders | {first.folder, RunFolder.open(None, manifest(), ITEMS[:3]).folder}) == 6


def test_notes_belong_to_the_whole_run(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    with pytest.raises(RunError, match="model.json: no such file"):
        run.noted("model")
    run.note("model", {"null_distance": 0.25})
    assert begin(run.folder).noted("model") == {"null_distance": 0.25}
    (run.folder / "model.json").write_text("{")
    with pytest.raises(RunError, match="model.json: cannot be read"):
        run.noted("model")


def test_drop_forgets_rows(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.append("answers", answer(ITEMS))
    run.drop("answers")
    run.drop("answers")  # nothing to forget is no error
    assert len(list(run.batches("answers", 7))) == 1


# --------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], "found no items"),
        ([{"key": "a"}, {"key": "b"}, {"key": "a"}], "the key a comes 2 times"),
        ([{"key": "a"}, {"prompt": "b"}, {"key": None}], "2 of 3 items have none"),
    ],
)
def test_items_need_keys_of_their_own(tmp_path: Path, items: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(RunError, match=words):
        begin(tmp_path / "run", items)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"settings": {**SETTINGS, "guidance_scale": 3.0}}, r"\(guidance_scale = 1.5, now 3.0\)"),
        ({"settings": {"seed": 0}}, r"\(guidance_scale = 1.5, now not set\)"),
        ({"settings": {**SETTINGS, "steps": 20}}, r"\(steps = not set, now 20\)"),
        ({"settings": {**SETTINGS, "threads": 4}}, r"\(threads = not set, now 4\)"),
        ({"settings": {"seed": "0", "guidance_scale": 1.5}}, r'\(seed = 0, now "0"\)'),
        ({"task": "geneval"}, r'\(task = "scenes", now "geneval"\)'),
        ({"device": "cuda"}, r'\(device = "cpu", now "cuda"\)'),
        ({"threads": 2}, r"\(threads = 1, now 2\)"),
        ({"versions": {"torch": "2.11.0"}}, r'\(torch = "2.13.0", now "2.11.0"\)'),
        ({"model_hash": "f" * 60 + "0000"}, r"\(model_hash = \.\.\.f+.*\.\.\., now \.\.\.ffffff0000.*\.\.\.\)"),
        ({"threads": 2, "settings": {"seed": 1, "guidance_scale": 1.5}}, r"threads = 1, now 2.*seed = 0, now 1"),
    ],
)
def test_a_run_of_something_else_is_refused_and_what_differs_is_named(
    tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    begin(tmp_path / "run")
    before = files(tmp_path / "run")
    with pytest.raises(RunError, match=words) as error:
        begin(tmp_path / "run", **changed)
    assert "name another folder" in str(error.value) and files(tmp_path / "run") == before


def test_other_items_are_refused(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    with pytest.raises(RunError, match=r"items = .*, now "):
        begin(tmp_path / "run", ITEMS[:-1])


def test_long_values_are_shown_from_where_they_part(tmp_path: Path) -> None:
    begin(tmp_path / "run", settings={"prompts": "x" * 100 + "first"})
    with pytest.raises(RunError, match=r"prompts = \.\.\.x+first.*, now \.\.\.x+second"):
        begin(tmp_path / "run", settings={"prompts": "x" * 100 + "second"})


def test_a_model_that_moved_is_the_same_model_and_the_run_keeps_its_hash(tmp_path: Path) -> None:
    run = complete(begin(tmp_path / "run"))
    moved = begin(run.folder, model="elsewhere/a")
    assert moved.hash == run.hash and moved.manifest.model == "models/a" and moved.scores()["score"] == 0.5


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds something else"):
        begin(tmp_path)
    assert files(tmp_path) == {"notes.txt": b"mine"}


def test_items_changed_after_the_run_began_are_refused(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    path = run.folder / "items.jsonl"
    path.write_text(path.read_text().replace("prompt 3", "prompt three"))
    for use in (RunFolder.load, lambda folder: begin(folder)):
        with pytest.raises(RunError, match="items.jsonl was changed after the run began"):
            use(run.folder)
    path.unlink()
    with pytest.raises(RunError, match="items.jsonl was changed"):
        RunFolder.load(run.folder)


@pytest.mark.parametrize("content", ["{", "[1]", '{"task": "scenes"}', '{"colour": "red"}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str) -> None:
    run = begin(tmp_path / "run")
    (run.folder / "manifest.json").write_text(content)
    with pytest.raises(RunError, match="manifest.json: cannot be read"):
        RunFolder.load(run.folder)


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder, for it has no manifest.json"):
        RunFolder.load(tmp_path)


@pytest.mark.parametrize(("line", "words"), [("{,}", "line 2: not valid JSON"), ("[1]", "line 2: no row with a `key`")])
def test_a_damaged_row_in_the_middle_is_named(tmp_path: Path, line: str, words: str) -> None:
    run = begin(tmp_path / "run")
    lines = [json.dumps(row) for row in answer(ITEMS)]
    (run.folder / "answers.jsonl").write_text("\n".join([lines[0], line, *lines[1:], ""]))
    with pytest.raises(RunError, match=words):
        run.rows("answers")


# -------------------------------------------------------------------------------------------------------- pictures


def test_pictures_lie_as_in_geneval_and_come_back(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.save_images({item["key"]: [picture(2 * n), picture(2 * n + 1)] for n, item in enumerate(ITEMS)})
    assert (run.folder / "images/00006/samples/0001.png").is_file()
    assert json.loads((run.folder / "images/00003/metadata.jsonl").read_text()) == ITEMS[3]
    found = begin(run.folder).images("k3")
    assert [image.tobytes() for image in found] == [picture(6).tobytes(), picture(7).tobytes()]


def test_pictures_are_made_anew_as_a_batch(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.save_images({"k0": [picture(0)]})
    assert [len(batch) for batch in run.batches("images", 3)] == [3, 3, 1]


def _change(path: Path) -> None:
    picture(99).save(path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_change, "was changed after it was made"),
        (Path.unlink, "no such file.*or delete .*images.jsonl"),
        (_cut, "damaged or cut short.*or delete .*images.jsonl"),
    ],
)
def test_pictures_that_are_not_those_made_are_refused(tmp_path: Path, harm: Callable[[Path], None], words: str) -> None:
    run = complete(begin(tmp_path / "run"))
    harm(run.folder / "images/00002/samples/0000.png")
    assert len(run.images("k1")) == 1
    with pytest.raises(RunError, match=words) as error:
        begin(run.folder).images("k2")
    assert "00002/samples/0000.png" in str(error.value)


def test_pictures_are_given_only_when_all_are_made(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.save_images({"k0": [picture(0)]})
    with pytest.raises(RunError, match="6 of 7 rows of images.jsonl"):
        run.images("k0")


# ---------------------------------------------------------------------------------------------------------- scores


def test_scores_say_what_they_belong_to(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    written = run.write_scores({"score": 0.25, "n": 7})
    assert written == run.scores() == run.scores("f" * 64)
    assert written == {
        **{"score": 0.25, "n": 7, "task": "scenes", "model": "models/a"},
        **{"model_hash": "f" * 64, "run": run.hash},
    }


def test_scores_of_another_model_are_refused(tmp_path: Path) -> None:
    run = complete(begin(tmp_path / "run"))
    with pytest.raises(RunError, match="scores of the model ffffffffffff, asked is eeeeeeeeeeee"):
        run.scores("e" * 64)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_scores_of_another_manifest_missing_or_damaged_are_refused(tmp_path: Path, content: str) -> None:
    one, two = complete(begin(tmp_path / "a")), begin(tmp_path / "b", settings={"seed": 1})
    with pytest.raises(RunError, match="has no scores yet: `pisces eval rescore"):
        two.scores()
    shutil.copy(one.folder / "scores.json", two.folder)
    with pytest.raises(RunError, match="scores of another manifest"):
        two.scores()
    (two.folder / "scores.json").write_text(content)
    with pytest.raises(RunError, match="scores.json: (cannot be read|scores of another manifest).*rescore"):
        two.scores()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = complete(begin(tmp_path / "run"))
    before = files(run.folder)

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(runs.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        run.write_scores({"score": 1.0})
    assert files(run.folder) == before  # the old scores, and no hidden file


# ---------------------------------------------------------------------------------------------------- what is hashed


def test_a_digest_knows_values_and_not_the_order_of_names() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert len({digest(value) for value in ({"a": 1}, {"a": 2}, {"a": "1"}, {"a": [1]}, {})}) == 5


def test_a_models_hash_follows_its_settings_and_weights_and_not_its_place(nano_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(nano_folder, tmp_path / "copy")
    assert model_hash(copy) == model_hash(nano_folder)
    for change in (
        lambda card: card["parts"]["llm"].update({"model.safetensors": "0" * 64}),
        lambda card: card["model"].update(template="llama3"),
    ):
        card = json.loads((nano_folder / "config.json").read_text())
        change(card)
        (copy / "config.json").write_text(json.dumps(card))
        assert model_hash(copy) != model_hash(nano_folder)
    card = json.loads((nano_folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**card, "record": [{"minutes": 1}]}))
    assert model_hash(copy) == model_hash(nano_folder)


def test_a_manifest_names_the_versions_that_matter() -> None:
    found = Manifest("scenes", "models/a", "f" * 64, {}).versions
    assert {"python", "machine", "torch", "transformers", "diffusers", "numpy", "pillow"} <= set(found)
