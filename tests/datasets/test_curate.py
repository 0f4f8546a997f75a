"""Curation: each rule at its boundary, what is kept is untouched, every sample is accounted for; and the figures."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from open_pisces.batch import Question, Sample
from open_pisces.data.shards import ShardError, ShardReader
from open_pisces.datasets.curate import RuleError, filter_dataset, parse_rule
from open_pisces.datasets.indexing import index_folder
from open_pisces.datasets.shard_writer import ShardWriter
from open_pisces.datasets.stats import (
    describe,
    histograms,
    measure,
    stats,
    summary,
)

MIT = [{"package": "a", "licence": "MIT"}]
Entry = tuple[Sample, tuple[bytes, ...]]


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """Smooth random blobs of colour."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def file_of(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def entry(key: str, *images: Image.Image | bytes, **fields: Any) -> Entry:
    files = tuple(image if isinstance(image, bytes) else file_of(image) for image in images)
    return Sample(key=key, images=(), source="test", **fields), files


def write(folder: Path, entries: Iterable[Entry], licences: list[dict[str, Any]] = MIT, per_shard: int = 3) -> Path:
    with ShardWriter(folder, per_shard, licences) as writer:
        for sample, files in entries:
            writer.write(sample, encoded=files)
    return folder


def keys(folder: Path) -> list[str]:
    reader = ShardReader(folder)
    return [reader.key(index) for index in range(len(reader))]


def kept(tmp_path: Path, rule: str, entries: Iterable[Entry], licences: list[dict[str, Any]] = MIT) -> str:
    """The keys a rule keeps; what it does not keep, it counts as its own."""
    source = write(tmp_path / "source", list(entries), licences)
    result = filter_dataset(source, tmp_path / "out", [rule])
    assert result["read"] == result["kept"] + sum(result["dropped"].values()) and not result["damaged"]
    assert list(result["dropped"]) == [rule.partition("=")[0]] and result["kept"] == len(keys(tmp_path / "out"))
    return " ".join(keys(tmp_path / "out"))


# --------------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ("size=64", "just wide both none"),
        ("size=63", "just under wide both none"),
        ("aspect=3", "just under wide both none"),
        ("aspect=2.99", "just under both none"),
        ("aspect=1.25", "just both none"),
    ],
)
def test_sizes_and_shapes_at_their_boundary(tmp_path: Path, rule: str, left: str) -> None:
    shapes = {"just": [(64, 80)], "under": [(80, 63)], "wide": [(192, 64)], "both": [(64, 64), (80, 64)], "none": []}
    shapes["one-bad"] = [(64, 64), (10, 400)]
    assert kept(tmp_path, rule, [entry(key, *(picture(0, *s) for s in size)) for key, size in shapes.items()]) == left


def test_caption_lengths_are_kept_with_both_ends(tmp_path: Path) -> None:
    captions = {"two": "a dog", "three": "a red dog.", "five": "a - dog on the grass!", "six": "1 2 3 4 5 6"}
    entries = [entry(key, short=text) for key, text in captions.items()]
    entries += [entry("long-detail", short="a red dog", detailed="a " * 6), entry("wordless", detailed="b c d e")]
    entries += [entry("none", questions=(Question("Why?", "So."),))]
    assert kept(tmp_path, "caption_length=3:5", entries) == "three five wordless none"


def test_repetition_at_its_boundary(tmp_path: Path) -> None:
    ten = "a b c d e f g a b c d e"  # three of ten runs were there before
    entries = [entry("at", short=ten), entry("over", short="x", detailed=ten + " f"), entry("none")]
    assert kept(tmp_path, "repetition=0.3", entries) == "at none"


def test_language_of_every_caption_counts(tmp_path: Path) -> None:
    entries = [
        entry("en", short="a red dog", detailed="There is a red dog on the grass."),
        entry("half", short="a red dog", detailed="На траве сидит красная собака."),
        entry("ru", short="красная собака"),
        entry("zh", short="红色的狗"),
        entry("none"),
    ]
    assert kept(tmp_path, "language=en", entries) == "en none"
    assert kept(tmp_path, "language=en,ru", entries) == "en half ru none"


@pytest.mark.parametrize(
    ("licences", "left"),
    [
        (MIT, "plain own"),
        ([*MIT, {"licence": "cc-by-4.0"}], "plain own"),
        ([*MIT, {"licence": "GPL-3.0"}], "own"),
        ([*MIT, {"package": "no licence named"}], "own"),
        ([], "own"),
    ],
)
def test_a_licence_is_the_samples_or_all_of_the_datasets(
    tmp_path: Path, licences: list[dict[str, Any]], left: str
) -> None:
    entries = [entry("plain", facts={"box": 1}), entry("own", facts={"licence": "mit"})]
    entries += [entry("other", facts={"licence": "proprietary"})]
    assert kept(tmp_path, "licence=MIT,CC-BY-4.0", entries, licences) == left
    assert ShardReader(tmp_path / "out").licences == licences


def test_pictures_that_cannot_be_read_or_are_not_there(tmp_path: Path) -> None:
    whole = file_of(picture(0), "JPEG")
    turn = {"role": "user", "content": [{"image": 1}, "And this?"]}
    entries = [
        entry("good", whole, short="a dog"),
        entry("cut", whole[: len(whole) // 2], short="a dog"),
        entry("second-cut", whole, whole[:100]),
        entry("words", conversation=({"role": "user", "content": ["Hello"]},)),
        entry("no-picture", short="a dog"),
        entry("asks", questions=(Question("What is it?", "a dog"),)),
        entry("turn", whole, conversation=(turn,)),
        entry("turns", whole, whole, conversation=(turn,)),
    ]
    assert kept(tmp_path, "missing_image", entries) == "good words turns"


# ------------------------------------------------------------------------------------------------------------ copies


def heart(colour: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((20, 16, 46, 50), fill=colour)
    return image


def test_copies_are_found_and_other_pictures_are_not(tmp_path: Path) -> None:
    one = picture(1, 96, 96)
    entries = [
        entry("one", one),
        entry("same-file", one, short="other words"),
        entry("jpeg", file_of(one, "JPEG", quality=75)),
        entry("smaller", one.resize((80, 76), Image.Resampling.LANCZOS)),
        entry("webp", file_of(one.resize((128, 128)), "WEBP", quality=80)),
        entry("red", heart("#d02020")),
        entry("red-jpeg", file_of(heart("#d02020"), "JPEG", quality=75)),
        entry("blue", heart("#2020d0")),  # the same shape
        *(entry(f"other{seed}", picture(seed)) for seed in range(2, 30)),
        entry("old-and-new", one, picture(50)),
        entry("all-old", picture(50), one),
        entry("none"),
    ]
    others = " ".join(f"other{seed}" for seed in range(2, 30))
    assert kept(tmp_path, "duplicate=4", entries) == f"one red blue {others} old-and-new none"


def test_only_what_was_kept_has_copies(tmp_path: Path) -> None:
    one = picture(1)
    source = write(tmp_path / "in", [entry("bad", one, short="no"), *(entry(k, one, short="a dog") for k in "ab")])
    for rules in (["caption_length=2:9", "duplicate=0"], ["duplicate=0", "caption_length=2:9"]):
        result = filter_dataset(source, tmp_path / "out", rules)
        assert keys(tmp_path / "out") == ["a"] and result["dropped"] == {"caption_length": 1, "duplicate": 1}


# --------------------------------------------------------------------------------------------------------- filtering


def test_what_is_kept_keeps_order_bytes_texts_and_licences(tmp_path: Path) -> None:
    forms = ("PNG", "JPEG", "WEBP")
    entries = [
        entry(
            f"k{n}",
            *(file_of(picture(n * 10 + i, 40 + n), forms[n % 3]) for i in range(n % 3)),
            short=f"naïve 猫 {n}",
            detailed="x" if n % 4 else "",
            questions=(Question("q?", "a", "what"),),
            conversation=({"role": "user", "content": ["hi"]},),
            facts={"box": [n]} if n % 2 else None,
        )
        for n in range(9, -1, -1)
    ]
    source = write(tmp_path / "in", entries)
    seen: list[tuple[int, int]] = []
    result = filter_dataset(source, tmp_path / "out", ["size=44"], 4, progress=lambda *done: seen.append(done))
    expected = [(sample, list(files)) for sample, files in entries if sample.key not in ("k1", "k2")]
    reader = ShardReader(tmp_path / "out")
    assert [(reader.words(i), reader.pictures(i)) for i in range(len(reader))] == expected
    assert reader.licences == MIT and len(list((tmp_path / "out").glob("*.tar"))) == 2
    assert result == {"read": 10, "kept": 8, "dropped": {"size": 2}, "damaged": {}}
    assert seen == [(n, 10) for n in range(1, 11)]


def test_the_first_rule_that_drops_a_sample_counts_it(tmp_path: Path) -> None:
    small, large = picture(0, 20, 20), picture(1)
    entries = [entry("both", small, short="x"), entry("size", small, short="a dog"), entry("words", large, short="x")]
    source = write(tmp_path / "in", [*entries, entry("good", large, short="a dog")])
    for rules, dropped in (
        (["size=64", "caption_length=2:9", "missing_image"], {"size": 2, "caption_length": 1, "missing_image": 0}),
        (["caption_length=2:9", "missing_image", "size=64"], {"caption_length": 2, "missing_image": 0, "size": 1}),
    ):
        result = filter_dataset(source, tmp_path / "out", rules)
        assert result["dropped"] == dropped and list(result["dropped"]) == list(dropped) and result["kept"] == 1


def test_damage_is_counted_by_cause_once_a_rule_meets_it(tmp_path: Path) -> None:
    cut = file_of(picture(3), "JPEG")[:200]
    headless = file_of(picture(3))[:12]
    entries = [entry("good", picture(0), short="a dog"), entry("bits", picture(1), short="a cat")]
    entries += [entry("cut", cut, short="a cow"), entry("headless", headless, short="a pig")]
    entries += [entry("words", short=5, detailed="a fly")]  # type: ignore[arg-type]
    source = write(tmp_path / "in", entries, per_shard=9)
    tar = source / "00000.tar"
    raw, bits = bytearray(tar.read_bytes()), file_of(picture(1))
    raw[raw.index(bits) + len(bits) - 20] ^= 1
    tar.write_bytes(raw)
    words = filter_dataset(source, tmp_path / "out", ["licence=MIT"])
    assert words["damaged"] == {"checksum": 1, "text": 1} and keys(tmp_path / "out") == ["good", "cut", "headless"]
    looks = filter_dataset(source, tmp_path / "out", ["size=64", "duplicate=4"])
    assert looks["damaged"] == {"checksum": 1, "image": 2, "text": 1} and keys(tmp_path / "out") == ["good"]
    first = filter_dataset(source, tmp_path / "out", ["missing_image", "size=64"])
    assert first["damaged"] == {"text": 1, "checksum": 1} and first["dropped"] == {"missing_image": 2, "size": 0}


def test_a_rule_on_words_does_not_read_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", [entry(f"k{n}", picture(n), short="a " * n) for n in range(1, 4)])
    read: list[int] = []
    pictures = ShardReader.pictures
    monkeypatch.setattr(ShardReader, "pictures", lambda self, at: read.append(at) or pictures(self, at))
    filter_dataset(source, tmp_path / "out", ["caption_length=2:2", "size=1", "duplicate=0"])
    assert read == [1]


def test_shards_of_others_with_keys_that_repeat_and_strange_pictures(tmp_path: Path) -> None:
    def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    (tmp_path / "in").mkdir()
    for name in ("a.tar", "b.tar"):
        with tarfile.open(tmp_path / "in" / name, "w") as tar:
            add(tar, "000.jpg", file_of(picture(0), "JPEG"))
            add(tar, "000.json", json.dumps({"caption": f"from {name}"}).encode())
            add(tar, f"{name[0]}1.jpg", file_of(picture(1), "BMP"))  # no JPEG, whatever its name says
            add(tar, f"{name[0]}1.json", b'{"caption": "a dog"}')
            add(tar, f"{name[0]}2.json", b'{"caption": "half a pair: \\ud83d"}')
    index_folder(tmp_path / "in", {"short": "caption"})
    result = filter_dataset(tmp_path / "in", tmp_path / "out", ["caption_length=1:9"])
    assert result == {"read": 5, "kept": 1, "dropped": {"caption_length": 0}, "damaged": {"unwritable": 4}}
    assert ShardReader(tmp_path / "out")[0].short == "from a.tar"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("sise=64", "no rule 'sise': did you mean 'size=64'?"),
        ("zzz", "no rule 'zzz': rules are size, aspect"),
        ("size", "rule 'size': needs a value: write 'size=64'"),
        ("missing_image=yes", "'missing_image=yes': takes no value: write 'missing_image'"),
        ("size=0", "0 is not 1 or more: write something like 'size=64'"),
        ("size=1.5", "'1.5' is no whole number"),
        ("aspect=0.9", "0.9 is not 1 or more"),
        ("aspect=inf", "inf is not 1 or more"),
        ("aspect=nan", "nan is not 1 or more"),
        ("repetition=1.01", "1.01 is not 0 to 1"),
        ("repetition=lots", "'lots' is no number"),
        ("caption_length=3", "'' is no whole number: write something like 'caption_length=3:200'"),
        ("caption_length=5:4", "5 is more than 4"),
        ("language=klingon", "'klingon' is none of ar, de"),
        ("duplicate=17", "17 is not 0 to 16"),
        ("licence=MIT,,X", "'MIT,,X' has an empty name"),
    ],
)
def test_a_rule_that_cannot_be_read_is_refused_with_its_form(rule: str, message: str) -> None:
    with pytest.raises(RuleError) as error:
        parse_rule(rule)
    assert message in str(error.value)


def test_refusals_leave_everything_as_it_was(tmp_path: Path) -> None:
    source = write(
        tmp_path / "all" / "in", [entry("a", picture(0), short="a dog"), entry("b", picture(1), short="a cat")]
    )
    old = write(tmp_path / "old", [entry("old")])
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(RuleError, match="none of 2 samples .* rule 'caption_length' dropped most"):
        filter_dataset(source, old, ["missing_image", "caption_length=3:9"])
    with pytest.raises(RuleError, match="no rule given: .*size=64"):
        filter_dataset(source, old, [])
    with pytest.raises(RuleError, match="'size' is given 2 times"):
        filter_dataset(source, old, ["size=1", "aspect=2", "size=2"])
    for out in (source, tmp_path / "all", tmp_path / "link"):
        with pytest.raises(ShardError, match="choose another folder"):
            filter_dataset(source, out, ["size=1"])
    with pytest.raises(RuleError, match="holds no samples"):
        filter_dataset(write(tmp_path / "empty", []), old, ["size=1"])
    with pytest.raises(ShardError, match="no dataset"):
        filter_dataset(tmp_path / "nowhere", old, ["size=1"])
    assert keys(old) == ["old"] and keys(source) == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "empty", "link", "old"]


# ------------------------------------------------------------------------------------------------------------ figures


class Letters:
    """A tokenizer of one token a letter, which remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        self.calls.append(len(texts))
        return {"input_ids": [[0] * len(text) for text in texts]}


def small_dataset(folder: Path) -> Path:
    """Five good samples, one of them twice, and one with half a picture."""
    one, turn = picture(1, 64, 48), {"role": "user", "content": [{"image": 0}, "Hi!", {"image": 1}]}
    asked = (Question("Who?", "a dog", "who"), Question("Why?", "so", "why"), Question("Who?", "I", "who"))
    return write(
        folder,
        [
            entry("a", one, short="a dog", detailed="a b c d e f g h i j", facts={"licence": "MIT"}),
            entry("b", one, short="a red dog"),
            entry("c", one.resize((66, 50), Image.Resampling.LANCZOS), short="the same dog", questions=asked),
            entry("d", picture(2), picture(3, 100, 48), conversation=(turn, {"role": "assistant", "content": "Oh"})),
            entry("e", short="no picture here", questions=(Question("Is it?", "no"),)),
            entry("f", file_of(picture(4), "JPEG")[:200], short="cut"),
        ],
        [{"package": "p", "licence": "MIT"}, {"package": "q", "licence": "CC0-1.0"}],
        per_shard=4,
    )


def test_figures_are_those_counted_by_hand(tmp_path: Path) -> None:
    source, letters = small_dataset(tmp_path / "in"), Letters()
    found = stats(source, letters)
    assert json.loads(json.dumps(found)) == found
    assert (found["samples"], found["read"], found["shards"], found["damaged"]) == (6, 6, 2, {"image": 1})
    assert found["bytes"] == sum(tar.stat().st_size for tar in source.glob("*.tar"))
    assert found["pictures"] == {"total": 5, "per_sample": {"0": 1, "1": 3, "2": 1}}
    assert found["sizes"]["common"][0] == ["64 x 48", 2] and len(found["sizes"]["common"]) == 4
    width, height = found["sizes"]["width"], found["sizes"]["height"]
    assert (width["min"], width["p50"], width["max"], width["mean"]) == (64, 64, 100, (64 + 64 + 66 + 64 + 100) / 5)
    assert (height["min"], height["p50"], height["p95"], height["max"]) == (48, 48, 64, 64)
    short, detailed = found["words"]["short"], found["words"]["detailed"]
    assert short == {"count": 4, "total": 11, "mean": 2.75, "min": 2, "p5": 2, "p50": 3, "p95": 3, "max": 3}
    assert (detailed["count"], detailed["p5"], detailed["max"]) == (1, 10, 10)
    tokens = {kind: (row["count"], row["total"], row["max"]) for kind, row in found["tokens"].items()}
    assert tokens["short"] == (4, 5 + 9 + 12 + 15, 15) and tokens["detailed"] == (1, 19, 19)
    assert tokens["questions"] == (4, 4 * 3 + 6, 6) and tokens["answers"] == (4, 5 + 2 + 1 + 2, 5)
    assert tokens["conversation"] == (2, 3 + 2, 3) and letters.calls == [15]
    assert found["tasks"] == {"short": 4, "detailed": 1, "questions": 2, "conversation": 1, "several pictures": 1}
    assert found["question_kinds"] == {"who": 1, "why": 1, "no kind": 1}
    assert found["duplicates"] == {"exact": 1, "near": 1}
    assert found["licences"]["of_samples"] == {"MIT": 1} and [r["licence"] for r in found["licences"]["table"]] == [
        "MIT",
        "CC0-1.0",
    ]


def test_a_limit_is_spread_over_the_dataset(tmp_path: Path) -> None:
    source = write(tmp_path / "in", [entry(f"k{n}", short="x " * (n + 1)) for n in range(10)])
    found = stats(source, limit=5)
    assert (found["samples"], found["read"], found["tokens"]) == (10, 5, None)
    assert found["words"]["short"]["total"] == 1 + 3 + 5 + 7 + 9
    assert stats(source, limit=99)["read"] == 10


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=60))
def test_percentiles_are_the_smallest_that_so_many_do_not_exceed(values: list[int]) -> None:
    found = summary(Counter(values))
    ordered = sorted(values) or [0]
    assert (found["min"], found["max"], found["count"], found["total"]) == (
        ordered[0],
        ordered[-1],
        len(values),
        sum(values),
    )
    for name, percent in (("p5", 5), ("p50", 50), ("p95", 95)):
        assert found[name] == next(v for v in ordered if 100 * sum(o <= v for o in values) >= percent * len(values))


def test_the_table_says_what_was_found(tmp_path: Path) -> None:
    text = describe(stats(small_dataset(tmp_path / "in"), Letters(), limit=5))
    assert "6 samples (5 of them read) in 2 shards" in text
    rows = {line[:20].strip(): line[20:].split() for line in text.splitlines()}
    assert rows["words, short"] == ["4", "11", "2.8", "2", "3", "3", "3"]
    assert rows["duplicates"] == ["exact:", "1,", "near:", "1"] and rows["damaged"] == ["none"]
    assert rows["licence table"] == ["MIT:", "1,", "CC0-1.0:", "1"]
    assert max(len(line.replace(str(tmp_path), "")) for line in text.splitlines()) <= 120


def test_histograms_are_a_picture_also_of_little(tmp_path: Path) -> None:
    source, target = small_dataset(tmp_path / "in"), tmp_path / "stats.png"
    stats(source, Letters(), target)
    with Image.open(target) as image:
        assert image.format == "PNG" and 1000 <= image.width <= 2000 and 700 <= image.height <= 1400
        assert len(set(image.convert("L").resize((60, 40)).tobytes())) > 10  # something is drawn
    histograms(measure(write(tmp_path / "words", [entry("a", questions=(Question("q", "a"),))])), target)
    assert Image.open(target).width > 1000
    with pytest.raises(ShardError, match="the folder .* does not exist"):
        stats(source, out_png=tmp_path / "no" / "stats.png")
    with pytest.raises(ShardError, match="no dataset"):
        stats(tmp_path / "nowhere")
