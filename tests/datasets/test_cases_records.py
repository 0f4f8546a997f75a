"""Awkward records that people meet, one test a kind: read as they are meant, or counted with a cause and a remedy."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from open_pisces.batch import CaptionError, Question, Sample, Turn, captions_of, draw_caption
from open_pisces.cli.commands import main
from open_pisces.config import DataConfig, SourceConfig
from open_pisces.data.lengths import check_lengths
from open_pisces.data.loader import PairLoader, SequenceLoader
from open_pisces.data.order import Draw, Mixture, stream
from open_pisces.data.prompts import LengthError, Renderer, SystemTurnError, TurnsError, sample_turns
from open_pisces.data.shards import DamagedSample, ShardError, ShardReader
from open_pisces.data.tokenizer import byte_tokenizer
from open_pisces.datasets import inline
from open_pisces.datasets.curate import filter_dataset
from open_pisces.datasets.importing import import_dataset
from open_pisces.datasets.indexing import index_folder, read_members
from open_pisces.datasets.readers import json_rows
from open_pisces.datasets.records import BadRecord, DatasetImportError, place
from open_pisces.datasets.shard_writer import ShardWriter
from open_pisces.datasets.stats import stats

TOKENIZER = byte_tokenizer("tiny")
RENDERER = Renderer(TOKENIZER, "tiny", 4, 2)


def picture(seed: int = 0, kind: str = "JPEG", size: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


A, B = picture(1), picture(2)


@pytest.fixture(autouse=True)
def _data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISCES_DATA", str(tmp_path / "data"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures, ``a.jpg`` and ``sub/b.jpg``."""
    root = tmp_path / "set"
    (root / "sub").mkdir(parents=True)
    (root / "a.jpg").write_bytes(A)
    (root / "sub" / "b.jpg").write_bytes(B)
    return root


def imported(source: Path, format: str = "folder", **options: Any) -> tuple[ShardReader, dict[str, Any]]:
    out = source.parent / "out" if source.name == "set" else source.parent.parent / "out"
    told = import_dataset(format, str(source), out, **{"max_bad": 0, **options})
    return ShardReader(out), told


def refused(source: Path, format: str = "folder", **options: Any) -> str:
    """The one line that an import ends with; it leaves nothing behind."""
    with pytest.raises(DatasetImportError) as error:
        imported(source, format, **options)
    assert not list(source.parent.rglob("*out*")) and "\n" not in str(error.value)
    str(error.value).encode()  # can be printed
    return str(error.value)


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def captions(reader: ShardReader) -> list[tuple[str, ...]]:
    return [reader.words(at).short_captions for at in range(len(reader))]


# --------------------------------------------------------------------------------------------- tables of captions


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("file_name,caption\na.jpg,a red square\n", id="comma"),
        pytest.param("file_name;caption\na.jpg;a red square\n", id="semicolon"),
        pytest.param("file_name\tcaption\na.jpg\ta red square\n", id="tab"),
        pytest.param("file_name|caption\na.jpg|a red square\n", id="bar"),
        pytest.param("sep=;\nfile_name;caption\na.jpg;a red square\n", id="excel"),
        pytest.param('\ufefffile_name;"a, b, c";caption\r\na.jpg;"x;y";a red square\r\n', id="commas_in_a_name"),
    ],
)
def test_the_delimiter_is_sniffed(text: str, folder: Path) -> None:
    (folder / "captions.csv").write_text(text, newline="")
    assert captions(imported(folder)[0]) == [("a red square",)]


def test_a_tsv_may_hold_commas_and_a_csv_semicolons(folder: Path) -> None:
    (folder / "captions.tsv").write_text("where\ten, or so\na.jpg\tone; two, three\n")
    fields = {"image_field": "where", "caption_field": "en, or so"}
    assert captions(imported(folder, **fields)[0]) == [("one; two, three",)]
    (folder / "captions.tsv").rename(folder / "captions.csv")
    (folder / "captions.csv").write_text("file,text\na.jpg,one; two\n")
    assert captions(imported(folder)[0]) == [("one; two",)]


def test_badheader_is_one_line(folder: Path) -> None:
    (folder / "captions.csv").write_text('"file_name"x,caption\na.jpg,a red square\n')
    assert "captions.csv: its header cannot be read" in refused(folder)
    (folder / "captions.csv").write_bytes("file_name,caption\na.jpg,x\n".encode("utf-16"))
    assert "save the file as UTF-8" in refused(folder)
    (folder / "captions.csv").write_bytes(b"file_name," + b"x" * 200_000 + b"\n")
    assert "header cannot be read" in refused(folder)


@pytest.mark.parametrize("name", ["sub\\b.jpg", "sub\\\\b.jpg", ".\\sub\\b.jpg"])
def test_backslash_names_a_folder_where_no_such_file_is(name: str, folder: Path) -> None:
    (folder / "captions.csv").write_text(f"file_name,caption\n{name},x\n")
    assert imported(folder)[0].pictures(0) == [B]
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A square."}]
    llava = lines(folder / "chat.jsonl", {"id": "1", "image": name, "conversations": turns})
    assert imported(llava, "llava")[0].pictures(0) == [B]
    pq.write_table(pa.table({"image": [name], "caption": ["x"]}), folder / "x.parquet")
    assert imported(folder / "x.parquet", "parquet")[0].pictures(0) == [B]


@pytest.mark.parametrize(
    "name", ["..\\secret.jpg", "sub\\..\\..\\secret.jpg", "\\\\host\\secret.jpg", "C:\\secret.jpg"]
)
def test_backslashes_do_not_lead_out_of_the_folder(name: str, folder: Path) -> None:
    (folder.parent / "secret.jpg").write_bytes(A)
    (folder / "captions.csv").write_text(f"file_name,caption\n{name},x\n")
    _, told = imported(folder, max_bad=1)
    assert told["written"] == 0 and set(told["skipped"]) <= {"outside the folder", "missing image"}


def test_a_file_whose_name_holds_a_backslash_is_itself(folder: Path) -> None:
    (folder / "sub\\b.jpg").write_bytes(A)
    (folder / "captions.csv").write_text("file_name,caption\nsub\\b.jpg,x\n")
    assert imported(folder)[0].pictures(0) == [A]


# ----------------------------------------------------------------------------------------------- several captions

TWO = ["a red square", "a square"]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"caption": TWO}, id="list"),
        pytest.param({"captions": TWO}, id="captions_key"),
        pytest.param({"sentences": [{"raw": TWO[0], "tokens": ["a"]}, {"raw": TWO[1]}]}, id="sentences_raw"),
        pytest.param({"captions": [{"caption": TWO[0], "id": 3}, {"caption": TWO[1]}]}, id="objects"),
        pytest.param({"captions": {"raw": TWO}}, id="columns"),
        pytest.param({"caption": [TWO[0], "", None, f" {TWO[1]} "]}, id="gaps"),
    ],
)
def test_a_list_of_captions_is_several_captions(row: dict[str, Any], folder: Path) -> None:
    lines(folder / "metadata.jsonl", {"file_name": "a.jpg", **row})
    assert captions(imported(folder)[0]) == [tuple(TWO)]
    members = {"a.jpg": A, "a.json": json.dumps(row).encode()}
    write_tar(folder / "0.tar", members)
    assert captions(imported(folder / "0.tar", "webdataset")[0]) == [tuple(TWO)]
    (field,) = row
    index_folder(folder, {"short": field})
    assert captions(ShardReader(folder)) == [tuple(TWO)]


@pytest.mark.parametrize(
    "cell", [TWO, [{"raw": text} for text in TWO], {"raw": TWO}], ids=["list", "structs", "struct"]
)
def test_tables_keep_several_captions(cell: Any, folder: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([{"bytes": A}]), "sentences": [cell]}), folder / "x.parquet")
    assert captions(imported(folder / "x.parquet", "parquet")[0]) == [tuple(TWO)]
    for path in (folder / "a.jpg", folder / "sub" / "b.jpg"):
        path.unlink()
    assert captions(imported(folder, "huggingface")[0]) == [tuple(TWO)]


@pytest.mark.parametrize("value", [[1, 2], [["a"]], [{"score": 1}], {"score": 1}])
def test_a_list_of_something_else_is_counted(value: Any, folder: Path) -> None:
    lines(folder / "metadata.jsonl", {"file_name": "a.jpg", "caption": value}, {"file_name": "a.jpg", "caption": "x"})
    reader, told = imported(folder, max_bad=1)
    assert told["skipped"] == {"caption": 1} and captions(reader) == [("x",)]
    write_tar(folder / "0.tar", {"a.jpg": A, "a.json": json.dumps({"caption": value}).encode()})
    index_folder(folder, {"short": "caption"})
    with pytest.raises(DamagedSample) as error:
        ShardReader(folder)[0]
    assert error.value.cause == "text"


def test_several_detailed_captions_are_refused_and_one_in_a_list_is_read(folder: Path) -> None:
    rows = [{"file_name": "a.jpg", "caption": "x", "detailed": value} for value in (["long"], ["long", "longer"])]
    reader, told = imported(lines(folder / "metadata.jsonl", *rows).parent, max_bad=1)
    assert told["skipped"] == {"caption": 1} and reader.words(0).detailed == "long"


def test_captions_of_no_form_are_none() -> None:
    assert captions_of(None) == captions_of(3.0) == captions_of([]) == captions_of("  ") == ()
    with pytest.raises(CaptionError, match="holds '3'"):
        captions_of(["a", 3])


def coco(**more: Any) -> dict[str, Any]:
    rows = [(1, TWO[0]), (2, "b"), (1, TWO[1])]
    return {
        "info": {"year": 2025, "nested": [1, {"images": [3]}]},
        "licenses": [{"id": 4, "name": "CC-BY"}],
        "images": [
            {"id": 2, "file_name": "sub/b.jpg", "license": 4, "coco_url": "http://x/b.jpg"},
            {"id": 1, "file_name": "a.jpg"},
        ],
        "annotations": [{"id": at, "image_id": image, "caption": text} for at, (image, text) in enumerate(rows)],
        **more,
    }


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("order", ["as it is", "annotations first", "pretty"])
def test_coco_captions(chunk: int, order: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", chunk)
    whole = coco()
    if order == "annotations first":
        whole = dict(reversed(whole.items()))
    path = folder / "captions_val.json"
    path.write_text("\ufeff" * (chunk == 7) + json.dumps(whole, indent=2 if order == "pretty" else None))
    (folder / "instances_val.json").write_text(json.dumps(coco(annotations=[{"bbox": [1]}])))
    for source, format in ((folder, "folder"), (path, "folder"), (path, "coco"), (folder, "coco")):
        reader, told = imported(source, format)
        assert captions(reader) == [("b",), tuple(TWO)] and [reader.key(at) for at in (0, 1)] == ["2", "1"]
        assert [reader.pictures(at) for at in (0, 1)] == [[B], [A]] and told["read"] == 2
        assert reader.words(0).facts == {"url": "http://x/b.jpg", "licence": "CC-BY"}


def test_coco_pictures_may_lie_elsewhere_and_karpathys_splits_are_chosen(folder: Path) -> None:
    annotations = folder.parent / "annotations"
    annotations.mkdir()
    images = [
        {"imgid": at, "filepath": path, "filename": name, "split": split, "sentences": [{"raw": text} for text in TWO]}
        for at, (path, name, split) in enumerate([("", "a.jpg", "train"), ("sub", "b.jpg", "test")])
    ]
    path = annotations / "dataset.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    reader, _ = imported(path, "coco", images=str(folder), split="test")
    assert captions(reader) == [tuple(TWO)] and reader.pictures(0) == [B]
    assert "no images of split 'val'" in refused_at(path, split="val", images=str(folder))


def refused_at(path: Path, **options: Any) -> str:
    with pytest.raises(DatasetImportError) as error:
        import_dataset("coco", str(path), path.parent / "new", **options)
    assert not (path.parent / "new").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (json.dumps(coco())[:-40], "cut short"),
        (json.dumps(coco()).replace('"id": 1', '"id": 1 1'), "cut short or no JSON"),
        (json.dumps(coco(annotations=[{"bbox": [1]}])), "its annotations hold bbox, no caption"),
        (json.dumps(coco(images=[])), "holds no images"),
        ("[]", "'{' should be|where one of { should be"),
        ("", "the end where one of {"),
    ],
)
def test_a_damaged_coco_file_is_one_line(text: str, why: str, folder: Path) -> None:
    path = folder / "captions.json"
    path.write_text(text)
    said = refused_at(path)
    assert "captions.json" in said and any(part in said for part in why.split("|"))


def test_coco_rows_that_cannot_be_used_are_counted(folder: Path) -> None:
    images = [*coco()["images"], 7, {"id": 9, "file_name": "gone.jpg"}, {"id": 8, "file_name": "a.jpg"}, {"id": 7}]
    more = [{"image_id": 9, "caption": "x"}, {"image_id": 7, "caption": "x"}, {"image_id": 1, "caption": 5}, "?"]
    path = folder / "captions.json"
    path.write_text(json.dumps(coco(images=images, annotations=[*coco()["annotations"], *more])))
    reader, told = imported(path, "coco", max_bad=1)
    assert told["skipped"] == {"row": 1, "missing image": 2, "no text": 1} and len(reader) == 2


def test_a_broken_number_in_a_large_object_ends_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", 64)
    path = tmp_path / "x.json"
    path.write_text('{"images": [{"id": 12 4' + ', "x": 1' * 1000)
    with pytest.raises(DatasetImportError, match="Expecting"):
        list(json_rows.object_rows(place(str(path)), ("images",)))
    monkeypatch.setattr(json_rows, "_LARGEST", 1000)
    path.write_text('{"images": [{"id": "' + "x" * 5000)
    with pytest.raises(DatasetImportError, match="does not end"):
        list(json_rows.object_rows(place(str(path)), ("images",)))


# ---------------------------------------------------------------------------------- several captions in a training


def dataset(root: Path, *samples: Sample) -> ShardReader:
    with ShardWriter(root) as writer:
        for sample in samples:
            writer.write(sample, (A,) if sample.images else ())
    return ShardReader(root)


def mixture_of(reader: ShardReader, tasks: dict[Any, float]) -> Mixture:
    return Mixture(DataConfig(sources=[SourceConfig(path="x", tasks=tasks)]), 0, lambda _: reader)


IMAGE = Image.new("RGB", (16, 16))
SEVERAL = Sample("a", (IMAGE,), short="one", more_captions=("two words", "a third caption"))


def test_one_of_several_captions_is_drawn_by_seed_epoch_and_sample() -> None:
    for task, place_of in (("generate_short", 0), ("caption_short", 1)):
        found = Counter[str]()
        for epoch in range(300):
            turns = [sample_turns(SEVERAL, task, stream(0, "render", 0, epoch, "a"), 0, 1) for _ in "ab"]
            assert turns[0] == turns[1]
            said = str(turns[0][place_of].content[-1])
            found.update(text for text in SEVERAL.short_captions if said.endswith(text))
        assert set(found) == set(SEVERAL.short_captions) and min(found.values()) > 60


class Counting:
    """A random stream that counts what is drawn."""

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def random(self) -> float:
        return 1.0

    def integers(self, high: int) -> int:
        self.drawn.append(high)
        return 0


def test_a_single_caption_draws_nothing_more_than_before() -> None:
    single = Sample("a", (IMAGE,), short="one")
    for task in ("generate_short", "caption_short"):
        alone, several = Counting(), Counting()
        sample_turns(single, task, alone, 0, 1)  # type: ignore[arg-type]
        sample_turns(SEVERAL, task, several, 0, 1)  # type: ignore[arg-type]
        assert len(alone.drawn) == 1 and several.drawn == [3, *alone.drawn]
    nothing: Any = None  # any draw would fail
    assert draw_caption(single, nothing) == "one" and draw_caption(Sample("a", ()), nothing) == ""


def test_pairs_draw_among_all_captions(tmp_path: Path) -> None:
    reader = dataset(tmp_path / "x", SEVERAL)
    loader = PairLoader(mixture_of(reader, {}), TOKENIZER, 0, 1, 1, (16, 16))
    found = {loader._read(Draw(source=0, index=0, epoch=epoch, lane=0, task="pair"))[2] for epoch in range(40)}
    assert found == set(SEVERAL.short_captions)


def test_a_single_caption_is_written_as_before_and_several_come_back(tmp_path: Path) -> None:
    reader = dataset(
        tmp_path / "x",
        Sample("a", (IMAGE,), short="one"),
        Sample("b", (IMAGE,), "one", more_captions=("2",)),
    )
    assert "more_captions" not in reader.text(0) and reader.text(1)["more_captions"] == ["2"]
    assert reader.words(1).more_captions == ("2",) == reader[1].more_captions


def test_rules_figures_and_lengths_know_every_caption(tmp_path: Path) -> None:
    reader = dataset(tmp_path / "x", SEVERAL, Sample("b", (IMAGE,), short="two words"))
    found = stats(tmp_path / "x", TOKENIZER)
    assert found["words"]["short"]["count"] == 4 and found["tasks"]["short"] == 2
    assert found["tokens"]["short"]["count"] == 4 and found["words"]["short"]["max"] == 3
    told = filter_dataset(tmp_path / "x", tmp_path / "y", ["caption_length=2:9"])
    assert told["dropped"] == {"caption_length": 1}
    filter_dataset(tmp_path / "x", tmp_path / "y", ["caption_length=1:9"])
    assert ShardReader(tmp_path / "y").words(0).short_captions == SEVERAL.short_captions
    long = Sample("c", (IMAGE,), short="short", more_captions=("x" * 60, "y"))
    for name, sample in (("fits", SEVERAL), ("long", long)):
        reader = dataset(tmp_path / name, sample)
        mixture, config = mixture_of(reader, {"generate_short": 1.0}), DataConfig(max_length=100)
        if name == "fits":
            check_lengths(mixture, RENDERER, config)
        else:
            with pytest.raises(LengthError, match="'c' takes"):
                check_lengths(mixture, RENDERER, config)


# -------------------------------------------------------------------------------------------------- conversations

SAYS = ({"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."})
ASKED = {"role": "user", "content": [{"image": 0}, "What is it?"]}
ANSWERED = {"role": "assistant", "content": ["A square."]}


def chat(folder: Path, *turns: Any, field: str = "conversations", **row: Any) -> Path:
    return lines(folder / "chat.jsonl", {"id": "1", "image": "a.jpg", field: list(turns), **row})


def one(source: Path, format: str = "llava", **options: Any) -> Sample:
    reader, told = imported(source, format, **options)
    assert told["skipped"] == {} and len(reader) == 1
    return reader[0]


def test_consecutive_turns_of_one_speaker_are_joined(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>"}, {"from": "human", "value": "What is it?"}, SAYS[1]]
    assert one(chat(folder, *turns)).conversation == (ASKED, ANSWERED)
    twice = one(chat(folder, *SAYS, {"from": "gpt", "value": "It is red."}))
    assert twice.conversation[1]["content"] == ["A square.\nIt is red."]


def test_no_placeholder_puts_the_pictures_at_the_head(folder: Path) -> None:
    turns = [{"from": "human", "value": "What is it?"}, SAYS[1]]
    assert one(chat(folder, *turns)).conversation == (ASKED, ANSWERED)
    both = one(chat(folder, *turns, *turns, image=["a.jpg", "sub/b.jpg"])).conversation
    assert both[0]["content"] == [{"image": 0}, {"image": 1}, "What is it?"] and both[2]["content"] == ["What is it?"]
    some = chat(folder, *SAYS, image=["a.jpg", "sub/b.jpg"])  # one placeholder for two pictures says nothing
    assert imported(some, "llava", max_bad=1)[1]["skipped"] == {"placeholders": 1}


@pytest.mark.parametrize("image", ["", None, [], [""], [None], "missing"])
def test_text_only_samples_train(image: Any, folder: Path) -> None:
    turns = [{"from": "human", "value": "Say hi"}, {"from": "gpt", "value": "hi"}]
    row = {} if image == "missing" else {"image": image}
    path = lines(folder / "chat.jsonl", {"id": "1", "conversations": turns, **row})
    assert one(path).images == ()
    reader, _ = imported(path, "llava")
    batch = sequences(reader, {"conversation": 1.0})
    assert not batch.skipped and batch.batches[0].understanding_pixels_BCHW.shape == (0, 3, 16, 16)


def test_a_question_about_no_picture_trains(tmp_path: Path) -> None:
    reader = dataset(tmp_path / "x", Sample("a", (), questions=(Question("1 + 1?", "2"), Question("2 + 2?", "4"))))
    step = sequences(reader, {"question": 1.0}, questions_per_image=2, row_length=512)
    assert not step.skipped and step.batches[0].text_at_K.numel() == 4


def sequences(reader: ShardReader, tasks: dict[Any, float], renderer: Renderer = RENDERER, **settings: Any) -> Any:
    """The first step over a dataset, after its length check."""
    mixture, config = mixture_of(reader, tasks), DataConfig(**settings)
    check_lengths(mixture, renderer, config)
    return SequenceLoader(mixture, renderer, config, 0, 1, 1, (16, 16))(0)


def test_a_system_turn_is_kept_in_place_of_the_templates(folder: Path) -> None:
    reader, _ = imported(chat(folder, {"from": "system", "value": "You are terse."}, *SAYS), "llava")
    system = {"role": "system", "content": ["You are terse."]}
    assert reader[0].conversation == (system, ASKED, ANSWERED)
    turns = sample_turns(reader[0], "conversation", stream(0), 0, 1)
    for name in ("tiny", "llama3"):
        renderer = Renderer(byte_tokenizer(name), name, 4, 2)
        written = str(renderer.tokenizer.decode(renderer.render(turns).ids))
        assert written.count("system") == 1 and "You are terse." in written and "Cutting Knowledge" not in written
        assert written.index("terse") < written.index("What is it?")
        assert renderer.render(turns[1:]).ids[-20:] == renderer.render(turns).ids[-20:]
    assert stats(folder.parent / "out", TOKENIZER)["tokens"]["conversation"]["count"] == 3
    assert filter_dataset(folder.parent / "out", folder.parent / "kept", ["missing_image"])["kept"] == 1


def test_a_template_without_a_system_turn_skips_and_counts_or_drops(folder: Path) -> None:
    reader, _ = imported(chat(folder, {"from": "system", "value": "You are terse."}, *SAYS), "llava")
    bare = Renderer(TOKENIZER, "tiny", 4, 2)
    bare.frame = {**bare.frame, "open": {k: v for k, v in bare.frame["open"].items() if k != "system"}}
    step = sequences(reader, {"conversation": 1.0}, bare)
    assert [skip.cause for skip in step.skipped] == ["system turn"] and "data.system=drop" in step.skipped[0].message
    with pytest.raises(SystemTurnError):
        bare.render((Turn("system", ("x",)), Turn("user", ("y",))))
    for renderer in (bare, RENDERER):
        step = sequences(reader, {"conversation": 1.0}, renderer, system="drop")
        ids = step.batches[0].ids_BS[0].tolist()
        assert not step.skipped and "terse" not in str(TOKENIZER.decode(ids))


@pytest.mark.parametrize(
    ("turns", "cause"),
    [
        ((*SAYS, {"from": "system", "value": "x"}), "turns"),
        (({"from": "system", "value": "<image>"}, *SAYS), "placeholders"),
        (({"from": "system", "value": "x"},), "turns"),
        (({"from": "tool", "value": "x"}, *SAYS), "turns"),
        ((*reversed(SAYS),), "turns"),
        (("Hello", "Hi"), "turns"),
        ((SAYS[0], {"role": "assistant", "content": [{"type": "image"}]}), "placeholders"),
        (({"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}, SAYS[1]), "part"),
        (({"role": "user", "content": []}, SAYS[1]), "no text"),
        (({"role": "user", "content": [3]}, SAYS[1]), "no text"),
    ],
)
def test_turns_of_another_form_are_counted(turns: tuple[Any, ...], cause: str, folder: Path) -> None:
    assert imported(chat(folder, *turns), "llava", max_bad=1)[1]["skipped"] == {cause: 1}


def test_an_empty_system_turn_says_nothing(folder: Path) -> None:
    assert one(chat(folder, {"from": "system", "value": ""}, *SAYS)).conversation == (ASKED, ANSWERED)


TEXT = {"type": "text", "text": "What is it?"}
URI = f"data:image/jpeg;base64,{base64.b64encode(A).decode()}"


@pytest.mark.parametrize(
    ("content", "row"),
    [
        pytest.param("<image>What is it?", {"image": None, "images": ["a.jpg"]}, id="role_content"),
        pytest.param([{"type": "image"}, TEXT], {}, id="parts"),
        pytest.param([{"type": "image", "text": None}, {**TEXT, "index": None}], {}, id="parts_of_a_table"),
        pytest.param([{"type": "image_url", "image_url": {"url": "a.jpg"}}, TEXT], {"image": None}, id="own_picture"),
        pytest.param([{"type": "image_url", "image_url": URI}, TEXT], {"image": None}, id="own_data_uri"),
        pytest.param([{"type": "image", "image": "a.jpg"}, TEXT], {}, id="own_and_given"),
        pytest.param([TEXT], {}, id="parts_without_a_place"),
    ],
)
def test_role_content_is_read(content: Any, row: dict[str, Any], folder: Path) -> None:
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "A square."}]},
    ]
    found = one(chat(folder, *turns, field="messages", **row))
    assert found.conversation == (ASKED, ANSWERED) and len(found.images) == 1


@pytest.mark.parametrize("image", [["a.jpg"], [{"bytes": A, "path": None}], "a.jpg"])
def test_tables_hold_messages_and_empty_pictures(image: Any, folder: Path) -> None:
    turns = [{"role": "user", "content": [{"type": "image", "text": None}, TEXT]}]
    turns += [{"role": "assistant", "content": [{"type": "text", "text": "A square."}]}]
    nothing: Any = [] if isinstance(image, list) else ""
    rows = [
        {"images": image, "messages": turns},
        {"images": nothing, "messages": [{**turns[0], "content": [TEXT]}, turns[1]]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet")
    reader, _ = imported(folder / "x.parquet", "parquet")
    assert reader[0].conversation == (ASKED, ANSWERED) and reader.pictures(0) == [A]
    assert reader[1].images == () and reader[1].conversation[0]["content"] == ["What is it?"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_datauri_and_base64_pictures_are_read(kind: str, folder: Path) -> None:
    raw = picture(3, kind)
    packed = base64.b64encode(raw).decode()
    head = f"data:image/{kind.lower()};base64,"
    safe = packed.translate(str.maketrans("+/", "-_"))  # of addresses
    for text in (head + packed, packed, packed.rstrip("="), head + safe, f"{packed[:76]}\n{packed[76:]}"):
        assert imported(chat(folder, *SAYS, image=text), "llava")[0].pictures(0) == [raw]
        listing = lines(folder / "metadata.jsonl", {"file_name": text, "caption": "x"})
        reader, _ = imported(listing)
        assert reader.pictures(0) == [raw] and reader.key(0) == "metadata-00000000"
        pq.write_table(pa.table({"image": [text], "caption": ["x"]}), folder / "x.parquet")
        assert imported(folder / "x.parquet", "parquet")[0].pictures(0) == [raw]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("data:image/jpeg;base64,@@@@", "base64"),
        ("data:image/jpeg;base64,", "empty"),
        ("data:image/svg+xml,<svg/>", "says that it is not base64"),
        (URI, "more than 0 MiB; keep it in a file"),
    ],
)
def test_a_bad_datauri_is_counted_as_its_own_cause(
    text: str, why: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inline, "LARGEST", 100)
    assert imported(chat(folder, *SAYS, image=text), "llava", max_bad=1)[1]["skipped"] == {"base64": 1}
    with pytest.raises(BadRecord, match=why):
        inline.picture_file(text, None)


def test_a_remote_address_is_refused_with_a_hint(folder: Path) -> None:
    said = refused(chat(folder, *SAYS, image="https://example.org/a.jpg"), "llava")
    assert "remote address 1 (1)" in said and "img2dataset" in said


# ----------------------------------------------------------------------------------------------------- webdataset


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("count", [4, 150])
def test_members_apart_say_how_to_sort(count: int, folder: Path) -> None:
    pictures = {f"{at:05d}.jpg": A for at in range(count)}
    write_tar(folder / "0.tar", pictures | {f"{at:05d}.txt": b"a square" for at in range(count)})
    said = refused(folder / "0.tar", "webdataset", max_bad=0.5)
    assert "next to each other" in said and "tar --sort=name" in said
    with pytest.raises(ShardError, match=r"'00000' are not next to each other.*tar --sort=name"):
        index_folder(folder, {"short": "txt"})
    assert not (folder / "index.json").exists()
    told = imported(folder / "0.tar", "webdataset", max_bad=1)[1]
    assert told["skipped"] == {"no text": count, "members apart": count}


def test_depth_and_masks_are_no_pictures_unless_they_are_named(folder: Path) -> None:
    depth, mask = picture(5, "PNG"), picture(6, "PNG")
    members = {
        "0.depth.png": depth,
        "0.jpg": A,
        "0.seg.png": mask,
        "0.depth.npy": b"x",
        "0.ocr.txt": b"no",
        "0.txt": b"x",
    }
    write_tar(folder / "0.tar", members)
    reader, _ = imported(folder / "0.tar", "webdataset")
    assert reader.pictures(0) == [A] and captions(reader) == [("x",)]
    reader, _ = imported(folder / "0.tar", "webdataset", image_field="seg.png")
    assert reader.pictures(0) == [mask]
    index_folder(folder, {"short": "txt"})
    assert ShardReader(folder).pictures(0) == [A] and captions(ShardReader(folder)) == [("x",)]
    index_folder(folder, {"short": "txt", "image": "depth.png"})
    assert ShardReader(folder).pictures(0) == [depth] and captions(ShardReader(folder)) == [("x",)]
    assert main(["data", "index", str(folder), "--short", "txt", "--image", "seg.png"]) == 0
    assert ShardReader(folder).pictures(0) == [mask]


@pytest.mark.parametrize(
    ("suffixes", "read"),
    [
        (["jpg", "txt", "json"], ["jpg", "txt", "json"]),
        (["1.jpg", "0.png", "10.jpg", "json"], ["0.png", "1.jpg", "10.jpg", "json"]),
        (["png", "jpg", "txt"], ["jpg", "txt"]),
        (["depth.png", "txt"], ["txt"]),
        (["v2.jpg", "v2.txt"], ["v2.jpg", "v2.txt"]),
        (["JPG", "depth.PNG", "cls", "npy"], ["JPG"]),
        (["npy", "cls"], []),
    ],
)
def test_which_members_are_read(suffixes: list[str], read: list[str]) -> None:
    assert [suffixes[at] for at in read_members(suffixes)] == read


# -------------------------------------------------------------------------------------------- turns in our shards


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "tool", "content": ["x"]},
        {"role": "user"},
        {"role": "user", "content": [None]},
        {"role": "user", "content": [{"image": "a"}]},
        {"role": "system", "content": [{"image": 0}]},
        "Hello",
    ],
)
def test_turns_that_are_none_are_skipped_and_counted(turn: Any, tmp_path: Path) -> None:
    reader = dataset(tmp_path / "x", Sample("a", (IMAGE,), conversation=(turn,)))
    step = sequences(reader, {"conversation": 1.0})
    assert [skip.cause for skip in step.skipped] == ["turns"]
    twice = ({"role": "system", "content": ["x"]},) * 2
    with pytest.raises(TurnsError, match="not the first"):
        sample_turns(Sample("a", (), conversation=twice), "conversation", stream(0), 0, 1)
