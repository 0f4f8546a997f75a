"""``pisces demo``: everything a Pisces does, on one sheet.

The model draws sixteen prompts, captions its own drawings, and talks about two scenes whose pairs of objects never
stood together in training. The sheet shows what came out, right or wrong; nothing is picked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont
from PIL.Image import Image
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from open_pisces.batch import Question, Sample
from open_pisces.data.images import save_whole
from open_pisces.data.prompts import wordings
from open_pisces.data.shards import ShardReader, data_path
from open_pisces.eval.scenes.vqa import matches

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

PICTURE, MARGIN, COLUMNS, SMALL, LARGE = 192, 20, 4, 14, 22
INK, PALE, RIGHT, WRONG, PAPER = "#1a1a1a", "#5f6368", "#1b7f3b", "#b3261e", "#fafafa"


@dataclass(frozen=True)
class Turn:
    """A question about a scene with its true answer (empty where there is no single one), and the model's."""

    asked: Question
    answer: str

    @property
    def ink(self) -> str:
        """The colour that tells a right answer from a wrong one."""
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
    console, scenes = Console(), held_out_scenes()
    pictures: list[Image] = []
    with Progress(*Progress.get_default_columns(), console=console) as bar:
        drawing, captioning = bar.add_task("drawing", total=len(PROMPTS)), bar.add_task("captioning", total=1)
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
    save_whole(draw_sheet(PROMPTS, pictures, captions, [scene.images[0] for scene in scenes], dialogues), out)
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
    sheet = Pillow.new("RGB", (width, 6000), PAPER)
    pen = _Pen(sheet)
    top = MARGIN + pen.write("Drawn from text, and captioned by the same model", MARGIN, MARGIN, width, LARGE, INK)
    for start in range(0, len(prompts), COLUMNS):
        row = range(start, min(start + COLUMNS, len(prompts)))
        lefts = [MARGIN + place * (PICTURE + MARGIN) for place in range(len(row))]
        top += MARGIN // 2
        top += max(pen.write(prompts[i], left, top, PICTURE, SMALL, INK) for i, left in zip(row, lefts, strict=True))
        for i, left in zip(row, lefts, strict=True):
            pen.paste(pictures[i], left, top)
        top += PICTURE + 4
        top += max(
            pen.write(f"“{captions[i]}”", left, top, PICTURE, SMALL, PALE) for i, left in zip(row, lefts, strict=True)
        )
    top += 2 * MARGIN
    top += pen.write("Asked about scenes with pairs it never saw", MARGIN, top, width, LARGE, INK) + MARGIN // 2
    for scene, dialogue in zip(scenes, dialogues, strict=True):
        pen.paste(scene, MARGIN, top)
        line, left, room = top, PICTURE + 2 * MARGIN, width - PICTURE - 3 * MARGIN
        for turn in dialogue:
            line += pen.write(turn.asked.question, left, line, room, SMALL, PALE)
            line += pen.write(turn.line, left, line, room, SMALL, turn.ink) + 6
        top = max(line, top + PICTURE) + MARGIN
    return sheet.crop((0, 0, width, top))


class _Pen:
    """Writes wrapped text and pastes enlarged pictures."""

    def __init__(self, sheet: Image) -> None:
        self.sheet, self.draw = sheet, ImageDraw.Draw(sheet)

    def write(self, text: str, left: int, top: int, width: int, size: int, ink: str) -> int:
        """Write ``text`` wrapped to ``width`` pixels; the height it took."""
        font = ImageFont.load_default(size)
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if self.draw.textlength(longer, font) <= width else [*lines, word]
        step = round(size * 1.35)
        for number, line in enumerate(lines):
            self.draw.text((left, top + number * step), line, fill=ink, font=font)
        return step * len(lines)

    def paste(self, picture: Image, left: int, top: int) -> None:
        """Enlarge ``picture`` to its square on the sheet, framed so that white grounds stand out."""
        enlarged = picture.convert("RGB").resize((PICTURE, PICTURE), Pillow.Resampling.BICUBIC)
        self.sheet.paste(enlarged, (left, top))
        self.draw.rectangle((left - 1, top - 1, left + PICTURE, top + PICTURE), outline="#d0d0d0")
