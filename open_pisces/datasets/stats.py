"""Statistics of a dataset: lengths, sizes, tasks, copies, licences; as a dictionary, a table and a histogram PNG.

Counts are kept by value (length -> samples), so that memory does not grow with the dataset, except for what finding
copies needs: some 500 bytes a picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from open_pisces.batch import Sample
from open_pisces.data.shards import DamagedSample, ShardError, open_dataset
from open_pisces.datasets.duplicates import CopyCounter
from open_pisces.datasets.language import words_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TASKS = ("short", "detailed", "questions", "conversation", "several pictures")
TEXTS = ("short", "detailed", "questions", "answers", "conversation")
_COMMON = 8  # image sizes and kinds of questions that are listed one by one
_TEXTS_AT_ONCE = 512  # given to the tokenizer


def checked(sample: Sample) -> Sample:
    """The sample, its captions, questions and answers known to be text.

    Raises:
        DamagedSample: if they are not.
    """
    texts: list[Any] = [sample.short, *sample.more_captions, sample.detailed]
    for asked in sample.questions:
        texts += (asked.question, asked.answer)
    if not all(isinstance(text, str) for text in texts):
        raise DamagedSample(f"sample {sample.key!r}: a caption, question or answer is no text: correct it", "text")
    return sample


# --------------------------------------------------------------------------------------------------------- counting


@dataclass
class Tally:
    """What was counted; every Counter maps a value to how often it occurred."""

    path: str
    samples: int
    shards: int
    bytes: int
    licences: list[dict[str, Any]]
    read: int = 0
    damaged: Counter[str] = field(default_factory=Counter)
    pictures: Counter[int] = field(default_factory=Counter)
    """Pictures of a sample."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(width, height) of the upright pictures."""
    words: dict[str, Counter[int]] = field(default_factory=lambda: {"short": Counter(), "detailed": Counter()})
    tokens: dict[str, Counter[int]] | None = None
    tasks: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(TASKS, 0)))
    kinds: Counter[str] = field(default_factory=Counter)
    """Samples that hold a question of a kind."""
    own_licences: Counter[str] = field(default_factory=Counter)
    exact: int = 0
    near: int = 0

    def add(self, sample: Sample) -> None:
        """Count what a sample holds, but for tokens and copies."""
        self.pictures[len(sample.images)] += 1
        self.sizes.update(image.size for image in sample.images)
        for name, texts in (("short", sample.short_captions), ("detailed", (sample.detailed,))):
            lengths = [len(words_of(text)) for text in texts if text.strip()]
            self.words[name].update(lengths)
            self.tasks[name] += bool(lengths)
        self.tasks.update(task for task in ("questions", "conversation") if getattr(sample, task))
        self.tasks["several pictures"] += len(sample.images) > 1
        self.kinds.update({str(question.kind or "no kind") for question in sample.questions})
        if isinstance(sample.facts, dict) and (own := sample.facts.get("licence")):
            self.own_licences[str(own)] += 1

    def figures(self) -> dict[str, Any]:
        """The result of `stats`."""
        sides = [Counter[int](), Counter[int]()]
        for (width, height), count in self.sizes.items():
            sides[0][width] += count
            sides[1][height] += count
        common = [[f"{width} x {height}", count] for (width, height), count in self.sizes.most_common(_COMMON)]
        return {
            "path": self.path,
            "samples": self.samples,
            "read": self.read,
            "shards": self.shards,
            "bytes": self.bytes,
            "pictures": {
                "total": self.sizes.total(),
                "per_sample": {str(n): c for n, c in sorted(self.pictures.items())},
            },
            "sizes": {"width": summary(sides[0]), "height": summary(sides[1]), "common": common},
            "words": {name: summary(counts) for name, counts in self.words.items()},
            "tokens": self.tokens and {name: summary(counts) for name, counts in self.tokens.items()},
            "tasks": dict(self.tasks),
            "question_kinds": dict(self.kinds.most_common()),
            "duplicates": {"exact": self.exact, "near": self.near},
            "licences": {"table": self.licences, "of_samples": dict(self.own_licences.most_common())},
            "damaged": dict(self.damaged),
        }


def summary(counts: Counter[int]) -> dict[str, float]:
    """Count, total, mean and percentiles (the smallest value that so many per cent do not exceed); zeros for none."""
    number = counts.total()
    total = sum(value * count for value, count in counts.items())
    values = sorted(counts) or [0]
    upto = np.cumsum([counts[value] for value in values])
    percents = {"min": 0, "p5": 5, "p50": 50, "p95": 95, "max": 100}
    places = {name: int(np.searchsorted(upto * 100, percent * number)) for name, percent in percents.items()}
    found = {name: values[place] for name, place in places.items()}
    return {"count": number, "total": total, "mean": total / max(1, number), **found}


def stats(
    path: str | Path, tokenizer: Any = None, out_png: str | Path | None = None, limit: int | None = None
) -> dict[str, Any]:
    """The figures of a dataset, ready for JSON; a sample that is damaged counts under its cause and nowhere else.

    Args:
        path: a dataset's folder or address, or its name under the data folder.
        tokenizer: called as ``tokenizer(texts, add_special_tokens=False)["input_ids"]``; without it ``tokens`` is None.
        out_png: where to write the histograms.
        limit: read only so many samples, spread evenly over the dataset.

    Returns:
        ``samples``, ``shards``, ``bytes`` of the whole dataset; of the ``read`` samples ``pictures``, ``sizes``,
        ``words``, ``tokens``, ``tasks`` and ``question_kinds`` (samples that hold them), ``duplicates`` (pictures:
        ``exact`` have the size and CRC-32 of an earlier one, ``near`` only look like one: the same hash and colors),
        ``licences``, ``damaged``.

    Raises:
        ShardError: no dataset there, or no folder for the picture.
    """
    if out_png is not None:
        _check_folder(Path(out_png))
    tally = measure(path, tokenizer, limit)
    if out_png is not None:
        histograms(tally, out_png)
    return tally.figures()


def measure(path: str | Path, tokenizer: Any = None, limit: int | None = None) -> Tally:
    """Count what `stats` reports, for the arguments it takes."""
    reader = open_dataset(path)
    shards = reader._shards
    tally = Tally(str(path), len(reader), len(shards), sum(shard["size"] for shard in shards), reader.licences)
    tokens = _Tokens(tokenizer)
    copies = CopyCounter()
    tally.read = len(reader) if limit is None else min(limit, len(reader))
    for number in range(tally.read):
        index = number * len(reader) // tally.read
        try:
            sample = checked(reader[index])
        except DamagedSample as error:
            tally.damaged[error.cause] += 1
            continue
        tally.add(sample)
        tokens.add(texts_of(sample))
        copies.add(reader.image_members(index), sample.images)
    tally.tokens = tokens.finish() if tokenizer is not None else None
    tally.exact = copies.exact
    tally.near = copies.near
    return tally


def texts_of(sample: Sample) -> Iterator[tuple[str, str]]:
    """(kind, text) of everything a sample says, kinds as in `TEXTS`; of conversations, the pieces of text."""
    yield from (("short", text) for text in sample.short_captions or ("",))
    yield ("detailed", sample.detailed)
    for question in sample.questions:
        yield from (("questions", question.question), ("answers", question.answer))
    for turn in sample.conversation:
        content = turn.get("content") if isinstance(turn, dict) else None
        parts = content if isinstance(content, list) else [content]
        yield from (("conversation", part) for part in parts if isinstance(part, str))


class _Tokens:
    """Counts tokens of texts, many texts a call."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._counts: dict[str, Counter[int]] = {kind: Counter() for kind in TEXTS}
        self._waiting: list[tuple[str, str]] = []

    def add(self, texts: Iterable[tuple[str, str]]) -> None:
        if self._tokenizer is not None:
            self._waiting += [(kind, text) for kind, text in texts if text.strip()]
        if len(self._waiting) >= _TEXTS_AT_ONCE:
            self.finish()

    def finish(self) -> dict[str, Counter[int]]:
        if self._waiting:
            rows = self._tokenizer([text for _, text in self._waiting], add_special_tokens=False)["input_ids"]
            for (kind, _), row in zip(self._waiting, rows, strict=True):
                self._counts[kind][len(row)] += 1
        self._waiting = []
        return self._counts


# ---------------------------------------------------------------------------------------------------------- showing


def describe(figures: dict[str, Any]) -> str:
    """The result of `stats` as a table for a terminal."""
    from rich import filesize

    read = "" if figures["read"] == figures["samples"] else f" ({figures['read']:,} of them read)"
    shards = f"{figures['shards']:,} shard{'s' if figures['shards'] != 1 else ''}, {filesize.decimal(figures['bytes'])}"
    rows = [(f"words, {name}", row) for name, row in figures["words"].items()]
    rows += [(f"tokens, {name}", row) for name, row in (figures["tokens"] or {}).items() if row["count"]]
    rows += [(f"picture {side}", figures["sizes"][side]) for side in ("width", "height")]
    table = Counter(str(row.get("licence", "unknown")) for row in figures["licences"]["table"])
    lines = {
        "pictures": figures["pictures"]["total"],
        "pictures a sample": {f"{n} in": c for n, c in figures["pictures"]["per_sample"].items()},
        "picture sizes": dict(figures["sizes"]["common"]),
        "tasks": figures["tasks"],
        "question kinds": dict(list(figures["question_kinds"].items())[:_COMMON]),
        "duplicates": figures["duplicates"],
        "licence table": table,
        "own licences": figures["licences"]["of_samples"],
        "damaged": figures["damaged"],
    }
    columns = ("count", "total", "mean", "p5", "p50", "p95", "max")
    listed = [f"{name:<20}{_listed(value)}" for name, value in lines.items() if value or name == "damaged"]
    return "\n".join(
        [
            f"{figures['path']}: {figures['samples']:,} samples{read} in {shards}",
            "",
            " " * 20 + "".join(f"{name:>11}" for name in columns),
            *(_row(name, [row[column] for column in columns]) for name, row in rows),
            "",
            *listed,
        ]
    )


def _row(name: str, values: list[float]) -> str:
    """A line of the table: whole numbers as they are, others with one decimal."""
    line = f"{name:<20}"
    for value in values:
        line += f"{value:>11,}" if isinstance(value, int) else f"{value:>11,.1f}"
    return line


def _listed(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(f"{name}: {count:,}" for name, count in value.items()) or "none"


# --------------------------------------------------------------------------------------------------------- picture

_COLORS = ("#3b6ea5", "#e08a3c", "#5a9e6f", "#a05195", "#8c8c8c")
_BARS = 60  # of a histogram whose values do not get one each


def histograms(tally: Tally, path: str | Path) -> Path:
    """Write a PNG of four panels: words of captions, tokens of texts, sizes of pictures, samples of each task.

    Raises:
        ShardError: if its folder does not exist.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    _check_folder(Path(path))
    figure = Figure(figsize=(12, 8.4), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15), facecolor="white")
    FigureCanvasAgg(figure)
    healthy = tally.read - tally.damaged.total()
    figure.suptitle(f"{tally.path}: {healthy:,} samples, {tally.sizes.total():,} pictures", fontsize=14)
    words, tokens, sizes, tasks = figure.subplots(2, 2).flat
    _spread(words, tally.words, "Caption lengths", "words", "captions")
    why_empty = "no tokenizer given" if tally.tokens is None else "no texts"
    _spread(tokens, tally.tokens or {}, "Tokens", "tokens", "texts", why_empty)
    _draw_sizes(sizes, tally.sizes)
    _bars(tasks, [(task, tally.tasks[task]) for task in TASKS], "Tasks", "samples")
    figure.savefig(path, format="png", dpi=110)
    return Path(path)


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise ShardError(f"{path}: the folder {path.parent} does not exist; create it first")


def _spread(axes: Axes, named: dict[str, Counter[int]], title: str, unit: str, of: str, why_empty: str = "") -> None:
    """Histograms of several Counters over each other: a bar a value where there are few, else equal steps."""
    named = {name: counts for name, counts in named.items() if counts}
    _dress(axes, title, unit, of, "" if named else why_empty or f"no {of}")
    if not named:
        return
    low = min(map(min, named.values()))
    longest = max(map(max, named.values()))
    high = min(longest, 2 * max(int(summary(counts)["p95"]) for counts in named.values()))
    if high < longest:  # a few very long ones would press all others into one bar
        axes.set_xlabel(f"{unit} (the last bar: {high:,} to {longest:,})")
    step = -(-(high - low + 1) // _BARS)
    edges = np.arange(low, high + step + 1, step) - 0.5
    for (name, counts), color in zip(named.items(), _COLORS, strict=False):
        heights, _ = np.histogram([min(value, high) for value in counts], edges, weights=list(counts.values()))
        label = f"{name} (median {summary(counts)['p50']:,})"
        axes.stairs(heights, edges, fill=True, alpha=0.35, color=color)
        axes.stairs(heights, edges, color=color, linewidth=1.4, label=label)
    axes.legend(frameon=False)


def _draw_sizes(axes: Axes, sizes: Counter[tuple[int, int]]) -> None:
    """A bar a size where there are few, else how the shorter and the longer sides are spread."""
    if len(sizes) <= _COMMON:
        _bars(axes, [(f"{w} x {h}", count) for (w, h), count in sizes.most_common()], "Picture sizes", "pictures")
        return
    sides: dict[str, Counter[int]] = {"shorter side": Counter(), "longer side": Counter()}
    for size, count in sizes.items():
        sides["shorter side"][min(size)] += count
        sides["longer side"][max(size)] += count
    _spread(axes, sides, "Picture sizes", "pixels", "pictures")


def _bars(axes: Axes, rows: list[tuple[str, int]], title: str, of: str) -> None:
    """A labelled bar a row, the first on top."""
    _dress(axes, title, of, "", "" if rows else f"no {of}")
    if not rows:
        return
    bars = axes.barh(range(len(rows)), [count for _, count in rows], color=_COLORS[0], height=0.6)
    axes.bar_label(bars, labels=[f"{count:,}" for _, count in rows], padding=4)
    axes.set_ylim(max(5, len(rows)) - 0.5, -0.5)  # the first on top; a single bar does not fill the panel
    axes.set_xlim(0, 1.15 * max(1, *(count for _, count in rows)))
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])


def _dress(axes: Axes, title: str, x: str, y: str, empty: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set(xlabel=x, ylabel=y, axisbelow=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e4e4e4", linewidth=0.8)
    axes.locator_params(integer=True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    if empty:
        axes.set_axis_off()
        axes.text(0.5, 0.5, empty, ha="center", va="center", transform=axes.transAxes, color="#777777")
