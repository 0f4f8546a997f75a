"""Galleries: fixed prompts, resumable drawing, sheets that label every picture, and what may stand side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL.Image import Image

from open_pisces import sheets
from open_pisces.datasets.scenes.layout import vocabulary
from open_pisces.datasets.scenes.texts import NUMBERS, ON_SIDE, words
from open_pisces.eval.drawing import gallery
from open_pisces.eval.drawing.gallery import (
    KINDS,
    PICTURE,
    compare,
    draw_gallery,
    items_of,
    model_names,
    prompt_sets,
    sheet,
)
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.run import RunError, RunFolder
from open_pisces.generate.generator import Generator

COLOURS = {"a cat": (200, 30, 30), "a red heart": (30, 200, 30)}


class Draughtsman:
    """Draws one colour for each prompt, and notes what it was asked."""

    device = "cpu"
    pisces = SimpleNamespace(settings=SimpleNamespace(decoder=SimpleNamespace(steps=20, guidance_scale=1.5)))

    def __init__(self, size: tuple[int, int] = (8, 8), break_at: int = -1) -> None:
        self.size, self.break_at, self.asked = size, break_at, list[tuple[str, ...]]()

    def image(self, prompts: list[str], n: int, steps: int, guidance_scale: float, seed: int) -> list[list[Image]]:
        if len(self.asked) == self.break_at:
            raise KeyboardInterrupt
        self.asked.append(tuple(prompts))
        return [
            [Pillow.new("RGB", self.size, COLOURS.get(p, (90, 90, 90 + j)) if p else 0) for j in range(n)]
            for p in prompts
        ]


def drawn(folder: Path, nano_folder: Path, generator: Any = None, **how: Any) -> RunFolder:
    return draw_gallery(generator or Draughtsman(), folder, nano_folder, **how)


# --------------------------------------------------------------------------------------------------------- the prompts


@pytest.mark.parametrize("name", ["scenes", "open"])
def test_a_set_has_twelve_simple_and_twelve_complex_prompts_of_its_own(name: str) -> None:
    items = items_of(name)
    assert [item["kind"] for item in items] == ["simple"] * 12 + ["complex"] * 12
    assert len({item["key"] for item in items}) == len({item["prompt"] for item in items}) == 24
    simple, complex_ = (prompt_sets()[name][kind] for kind in KINDS)
    assert max(map(len, simple)) < 45 and min(map(len, complex_)) > max(map(len, simple))
    assert all(prompt == " ".join(prompt.split()) for prompt in (*simple, *complex_))


def captions() -> list[re.Pattern[str]]:
    """All that scene captions can be, from the tables that write them: short ones, then detailed ones."""
    table, things = words(), [*vocabulary().objects, *vocabulary().shapes]
    style = "(?:(?:blob|glossy|flat|3d) )?"
    one = f"(?:{'|'.join(thing.name for thing in things)})"
    many = f"(?:{'|'.join(thing.plural for thing in things)})"
    ground = f"(?:{'|'.join(vocabulary().backgrounds)})"
    on = f"(?: on {ground})?"
    relations, places = "|".join(table["relations"]), "|".join(table["short_places"].values())
    found = [
        f"an? (?:small )?{style}{one}(?: (?:{places}))?{on}",
        f"an? {style}{one} (?:{relations}) an? {style}{one}{on}",
        f"(?:{'|'.join(NUMBERS)}) {style}{many}(?: in a triangle)?{on}",
    ]
    fill = {name: f"(?:[Aa]n? )?{one}" for name in ("thing", "a_thing", "a_first", "A_first", "a_second", "A_second")}
    fill |= {"background": ground, "a_background": f"an? {ground}", "size": "(?:small|large)", "things": many}
    fill |= {"style": "(?: in (?:blob|glossy|flat|3d) style)?", "number": f"(?:{'|'.join(NUMBERS)})"}
    fill |= {"Number": f"(?:{'|'.join(NUMBERS).title()})", "at_first": f"(?:{'|'.join(ON_SIDE.values())})"}
    fill |= {"at_second": fill["at_first"], "relation": f"(?:{'|'.join(table['relations'].values())})"}
    fill |= {key: f"(?:{'|'.join(table[key + 's'].values())})" for key in ("place", "arrangement")}
    found += [text.format(**fill) for texts in table["detailed"].values() for text in texts]
    return [re.compile(pattern) for pattern in found]


def test_prompts_of_the_scenes_are_captions_as_training_wrote_them() -> None:
    patterns = captions()
    assert not any(pattern.fullmatch("a unicorn on blue") for pattern in patterns)
    for item in items_of("scenes"):
        own = patterns[:3] if item["kind"] == "simple" else patterns[3:]
        assert any(pattern.fullmatch(item["prompt"]) for pattern in own), item["prompt"]


def test_both_kinds_ask_for_every_layout_of_the_scenes() -> None:
    patterns = captions()
    layouts = [patterns[:1], patterns[1:2], patterns[2:3], patterns[3:7], patterns[7:11], patterns[11:]]
    prompts = [item["prompt"] for item in items_of("scenes")]
    assert all(any(p.fullmatch(prompt) for p in layout for prompt in prompts) for layout in layouts)


def test_an_unknown_set_is_refused_with_the_known_ones(tmp_path: Path, nano_folder: Path) -> None:
    with pytest.raises(EvaluationError, match="no gallery is called 'art': choose scenes or open"):
        drawn(tmp_path / "run", nano_folder, prompt_set="art")
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------------- drawing


def test_a_gallery_is_a_run_with_the_models_own_settings_and_a_sheet(tmp_path: Path, nano_folder: Path) -> None:
    generator = Draughtsman()
    run = drawn(tmp_path / "run", nano_folder, generator)
    assert run.manifest.settings == {
        **{"prompt_set": "scenes", "version": prompt_sets()["scenes"]["version"], "n": 1, "seed": 0},
        **{"steps": 20, "guidance_scale": 1.5, "batch_size": 4},
    }
    assert [len(batch) for batch in generator.asked] == [4] * 6
    assert run.images("simple-00")[0].getpixel((0, 0)) == COLOURS["a cat"]
    with Pillow.open(run.folder / gallery.SHEET) as found:
        assert found.size == (4 * PICTURE + 5 * gallery.MARGIN, found.height)


def test_a_gallery_that_was_interrupted_goes_on(tmp_path: Path, nano_folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "run", nano_folder, Draughtsman(break_at=2))
    assert not (tmp_path / "run" / gallery.SHEET).exists()
    rest = Draughtsman()
    drawn(tmp_path / "run", nano_folder, rest)
    assert len(rest.asked) == 4
    straight = drawn(tmp_path / "other", nano_folder)
    for name in ("images.jsonl", gallery.SHEET):
        assert (tmp_path / "run" / name).read_bytes() == (straight.folder / name).read_bytes()


def test_other_settings_need_a_folder_of_their_own(tmp_path: Path, nano_folder: Path) -> None:
    drawn(tmp_path / "run", nano_folder)
    with pytest.raises(RunError, match=r"guidance_scale = 1.5, now 3.0"):
        drawn(tmp_path / "run", nano_folder, guidance_scale=3.0)


def test_a_real_model_draws_a_gallery(tmp_path: Path, nano_folder: Path) -> None:
    generator = Generator.from_pretrained(nano_folder, "cpu")
    run = draw_gallery(generator, tmp_path / "run", nano_folder, steps=1, batch_size=24)
    size = generator.pisces.settings.generation.image_size
    assert {run.images(item["key"])[0].size for item in run.items} == {(size, size)}
    again = draw_gallery(generator, tmp_path / "again", nano_folder, steps=1, batch_size=24)
    assert again.hash == run.hash
    assert (again.folder / "images.jsonl").read_bytes() == (run.folder / "images.jsonl").read_bytes()


# ----------------------------------------------------------------------------------------------------------- the sheets


def find(image: Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of all pixels of a colour."""
    rows, columns = np.nonzero((np.asarray(image) == colour).all(axis=-1))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_a_sheet_shows_every_picture_whole_and_framed(tmp_path: Path, nano_folder: Path) -> None:
    image = sheet(drawn(tmp_path / "run", nano_folder))
    left, top, right, bottom = find(image, COLOURS["a cat"])
    assert (left, right - left, bottom - top) == (gallery.MARGIN, PICTURE, PICTURE)
    heart = find(image, COLOURS["a red heart"])
    assert heart[:2] == (left + PICTURE + gallery.MARGIN, top)
    frame = tuple(int(sheets.FRAME[i : i + 2], 16) for i in (1, 3, 5))
    assert image.getpixel((left - 1, top + 9)) == image.getpixel((right, top + 9)) == frame


def test_side_by_side_a_row_is_a_prompt_and_a_column_a_model(tmp_path: Path, nano_folder: Path) -> None:
    one = drawn(tmp_path / "one", nano_folder)
    two = drawn(tmp_path / "two", nano_folder, guidance_scale=1.0, n=2)
    found = compare([one.folder, two.folder], tmp_path / "compare.png")
    name = model_names([str(nano_folder)])[str(nano_folder)]
    assert found["prompts"] == 24 and found["models"] == [
        f"{name}, pictures {n}, guidance {g}" for n, g in ((1, 1.5), (2, 1.0))
    ]
    with Pillow.open(found["file"]) as opened:
        image = opened.convert("RGB")
    left, top, right, bottom = find(image, COLOURS["a cat"])
    assert (left, bottom - top) == (gallery.WORDS + 2 * gallery.MARGIN, PICTURE)
    assert right - left == 3 * PICTURE + gallery.MARGIN + gallery.GAP  # one picture of the first, two of the second
    heart = find(image, COLOURS["a red heart"])
    assert (heart[0], heart[1]) == (left, bottom + gallery.MARGIN)


def test_only_galleries_of_the_same_prompts_stand_side_by_side(tmp_path: Path, nano_folder: Path) -> None:
    scenes = drawn(tmp_path / "scenes", nano_folder)
    art = drawn(tmp_path / "open", nano_folder, prompt_set="open")
    with pytest.raises(RunError, match=r"open drew other prompts \('open', version 1\) than .*\('scenes', version 1\)"):
        compare([scenes.folder, art.folder], tmp_path / "compare.png")
    with pytest.raises(EvaluationError, match="name two galleries or more, not 1"):
        compare([scenes.folder], tmp_path / "compare.png")
    other = RunFolder.open(tmp_path / "vqa", gallery.Manifest("scenes", "a", "f" * 64, {}), [{"key": "a"}])
    with pytest.raises(RunError, match="vqa is a run of 'scenes': only galleries"):
        compare([scenes.folder, other.folder], tmp_path / "compare.png")
    assert not (tmp_path / "compare.png").exists()


def test_a_gallery_that_is_not_complete_is_not_compared(tmp_path: Path, nano_folder: Path) -> None:
    one = drawn(tmp_path / "one", nano_folder)
    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "two", nano_folder, Draughtsman(break_at=5))
    with pytest.raises(RunError, match="4 of 24 rows of images.jsonl are missing"):
        compare([one.folder, tmp_path / "two"], tmp_path / "compare.png")


# ---------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["open_pisces/weights/tiny"], ["tiny"]),
        (["runs/tiny/stage3/model"], ["stage3"]),
        (["runs/tiny/stage3/model", "runs/nano/stage3/model"], ["tiny/stage3", "nano/stage3"]),
        (["a/x/tiny", "b/x/tiny", "nano"], ["a/x/tiny", "b/x/tiny", "nano"]),
        (["tiny", "other/tiny"], ["tiny", "other/tiny"]),
        (["model"], ["model"]),
        (["/models/tiny/"], ["tiny"]),
        ([], []),
    ],
)
def test_models_are_called_by_the_shortest_endings_that_differ(models: Sequence[str], names: list[str]) -> None:
    assert [model_names(models)[model] for model in models] == names


def headed(tmp_path: Path, *made: tuple[str, str, dict[str, Any]]) -> list[tuple[str, str]]:
    """The headings of runs of (model, hash, settings)."""
    plain = gallery.Manifest("gallery", "", "", {}, versions={}, threads=1)
    manifests = [gallery.Manifest(**{**asdict(plain), "model": m, "model_hash": h, "settings": s}) for m, h, s in made]
    return gallery.headings(
        [RunFolder(tmp_path / f"run{number}", manifest, []) for number, manifest in enumerate(manifests)]
    )


def test_headings_say_what_tells_the_columns_apart_and_nothing_else(tmp_path: Path) -> None:
    same = {"seed": 0}
    assert headed(tmp_path, ("x/a", "1" * 64, same), ("x/b", "2" * 64, same)) == [("a", ""), ("b", "")]
    assert headed(tmp_path, ("x/a", "1" * 64, same), ("x/a", "1" * 64, {"seed": 7})) == [
        ("a", "seed 0"),
        ("a", "seed 7"),
    ]
    trained = headed(tmp_path, ("x/a", "1" * 64, same), ("x/a", "2" * 64, same), ("x/b", "3" * 64, same))
    assert trained == [("a", "weights 11111111"), ("a", "weights 22222222"), ("b", "")]
    assert headed(tmp_path, ("x/a", "1" * 64, same), ("x/a", "1" * 64, same)) == [("a", "run0"), ("a", "run1")]
