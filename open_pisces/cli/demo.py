"""``pisces demo``: everything a Pisces does, on one sheet.

The model draws sixteen prompts, captions its own drawings, and talks about two scenes whose pairs of objects never
stood together in training. The sheet shows what came out, right or wrong; nothing is picked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from open_pisces.batch import Question, Sample
from open_pisces.data.prompts import wordings
from open_pisces.data.shards import ShardReader, data_path
from open_pisces.eval.scenes.vqa import matches
from open_pisces.files import whole_file
from open_pisces.sheets import INK, PALE, Page

if TYPE_CHECKING:
    from open_pisces.generate.generator import Generator

PROMPTS = (
    "a cat",
    "a red heart",
    "a rocket",
    "an apple",
    "a tree",
    "a penguin",
    "a blue circle",
    "a 3d pizza",
    "a house on green",
    "a small star at the top right on blue",
    "a flat car on the left on pink",
    "three strawberries",
    "two frogs on yellow",
    "a dog left of a banana",
    "a blue circle above a lion",
    "a green heart right of a rabbit on pink",
)
SCENES = "fixture/pairs"
AT_ONCE = 4
"""Prompts in one batch: small enough for the bar to move."""

PICTURE = 192
MARGIN = 20
COLUMNS = 4
SMALL = 14
LARGE = 22
RIGHT = "#1b7f3b"
WRONG = "#b3261e"


@dataclass(frozen=True)
class Turn:
    """A question about a scene with its true answer (empty where there is no single one), and the model's."""

    asked: Question
    answer: str

    @property
    def ink(self) -> str:
        """The color that tells a right answer from a wrong one."""
        if not self.asked.answer:
            return INK
        return RIGHT if matches(self.asked, self.answer) else WRONG

    @property
    def line(self) -> str:
        """The answer, with the truth beside it where they differ."""
        return self.answer if self.ink != WRONG else f"{self.answer} (truth: {self.asked.answer})"


def run_demo(generator: Generator, out: Path, seed: int = 0) -> None:
    """Draw, caption, answer; write the sheet and print the dialogue.

    Args:
        generator: the model.
        out: the sheet's file; it appears when it is complete.
        seed: of the drawings' noise.

    Raises:
        ShardError: if the packaged scenes are missing.
    """
    console = Console()
    scenes = held_out_scenes()
    pictures: list[Image] = []
    with Progress(*Progress.get_default_columns(), console=console) as bar:
        drawing = bar.add_task("drawing", total=len(PROMPTS))
        captioning = bar.add_task("captioning", total=1)
        answering = bar.add_task("answering", total=len(scenes))
        for start in range(0, len(PROMPTS), AT_ONCE):
            drawn = generator.image(list(PROMPTS[start : start + AT_ONCE]), seed=seed + start)
            pictures += [row[0] for row in drawn]
            bar.update(drawing, completed=len(pictures))
        prompt = wordings()["caption_short"][0]
        captions = generator.text([[picture] for picture in pictures], [prompt] * len(pictures))
        bar.update(captioning, completed=1)
        dialogues = []
        for scene in scenes:
            dialogues.append(talk(generator, scene))
            bar.update(answering, completed=len(dialogues))
    with whole_file(out) as hidden:
        draw_sheet(PROMPTS, pictures, captions, [scene.images[0] for scene in scenes], dialogues).save(hidden)
    for number, dialogue in enumerate(dialogues, start=1):
        console.print(f"\nscene {number}", style="bold")
        for turn in dialogue:
            console.print(Text(f"  {turn.asked.question}  ").append(turn.line, style=turn.ink))
    console.print(Text(f"\nthe sheet: {out}"))


def held_out_scenes() -> list[Sample]:
    """The two scenes that the demo talks about: the first and the middle one of the packaged held-out pairs."""
    reader = ShardReader(data_path(SCENES))
    return [reader[0], reader[len(reader) // 2]]


def talk(generator: Generator, scene: Sample) -> list[Turn]:
    """A detailed description of a scene, and an answer to one question of each kind it has."""
    first: dict[str, Question] = {}
    for question in scene.questions:
        first.setdefault(question.kind, question)
    asked = [Question(wordings()["caption_detailed"][0], ""), *first.values()]
    answers = generator.text([[scene.images[0]]] * len(asked), [question.question for question in asked])
    return [Turn(question, answer) for question, answer in zip(asked, answers, strict=True)]


def draw_sheet(
    prompts: Sequence[str],
    pictures: Sequence[Image],
    captions: Sequence[str],
    scenes: Sequence[Image],
    dialogues: Sequence[Sequence[Turn]],
) -> Image:
    """Prompts above their pictures with the model's captions below; then the scenes, each beside its dialogue."""
    width = COLUMNS * (PICTURE + MARGIN) + MARGIN
    page = Page(MARGIN, PICTURE, width=width)
    page.down(page.write("Drawn from text, and captioned by the same model", MARGIN, width, LARGE))
    for start in range(0, len(prompts), COLUMNS):
        row = range(start, min(start + COLUMNS, len(prompts)))
        lefts = {i: MARGIN + place * (PICTURE + MARGIN) for place, i in enumerate(row)}
        page.down(MARGIN // 2)
        page.down(max(page.write(prompts[i], lefts[i], PICTURE, SMALL) for i in row))
        for i in row:
            page.show([pictures[i]], lefts[i])
        page.down(PICTURE + 4)
        page.down(max(page.write(f"“{captions[i]}”", lefts[i], PICTURE, SMALL, PALE) for i in row))
    page.down(2 * MARGIN)
    page.down(page.write("Asked about scenes with pairs it never saw", MARGIN, width, LARGE) + MARGIN // 2)
    left = PICTURE + 2 * MARGIN
    for scene, dialogue in zip(scenes, dialogues, strict=True):
        bottom = page.top + PICTURE
        page.show([scene], MARGIN)
        for turn in dialogue:
            page.down(page.write(turn.asked.question, left, width - left - MARGIN, SMALL, PALE))
            page.down(page.write(turn.line, left, width - left - MARGIN, SMALL, turn.ink) + 6)
        page.top = max(page.top, bottom) + MARGIN
    return page.image()
