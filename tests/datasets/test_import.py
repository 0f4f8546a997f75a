"""Datasets of others: read as they are, the unusable counted by cause, all else unchanged and in order."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from open_pisces.data.images import open_image
from open_pisces.data.shards import ShardError, ShardReader
from open_pisces.datasets import importing
from open_pisces.datasets.importing import FORMATS, import_dataset, read_records
from open_pisces.datasets.readers import json_rows, webdataset
from open_pisces.datasets.readers.conversations import conversation
from open_pisces.datasets.records import BadRecord, DatasetImportError, Options, Place, Record, place

Row = tuple[str, bytes | None, bytes | None]
"""Name, file of the picture, text; None where it is missing."""


# ------------------------------------------------------------------------------------------------------ pictures


def picture(
    seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (16, 12), mode: str = "RGB", **more: Any
) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **more)
    return buffer.getvalue()


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def grey_16_bits() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG that claims 100,000 x 100,000 pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0")))
    parts = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


PICTURES = {
    "rgb": picture(1),
    "jpeg": picture(2, "JPEG"),
    "cmyk": picture(3, "JPEG", mode="CMYK"),
    "grey16": grey_16_bits(),
    "gif": animated("GIF"),
    "webp": animated("WEBP"),
    "tiff": picture(4, "TIFF"),
}
SPOILED = {
    "corrupt": (b"no picture at all", "image"),
    "zero": (b"", "image"),
    "cut": (picture(5, size=(64, 64))[:2000], "image"),
    "bomb": (bomb(), "image"),
    "dot": (picture(6, size=(1, 1)), "shape"),
    "line": (picture(7, size=(20_000, 1)), "shape"),
    "strip": (picture(8, size=(400, 10)), "shape"),
    "gone": (None, "missing image"),
}


def good_rows() -> list[Row]:
    return [(f"{i:02d}-{name}", raw, f"naïve 猫 {i}".encode()) for i, (name, raw) in enumerate(PICTURES.items())]


def mixed_rows() -> tuple[list[Row], Counter[str]]:
    """Good rows with every kind of bad one between them, and the causes."""
    bad: list[tuple[Row, str]] = [((name, raw, b"words"), cause) for name, (raw, cause) in SPOILED.items()]
    bad += [(("bytes", picture(), b"caf\xe9 \xff"), "not UTF-8"), (("silent", picture(), None), "no text")]
    rows, good = [], good_rows()
    for at, ((name, raw, text), _) in enumerate(bad):
        rows += [(f"{at:02d}-bad-{name}", raw, text), *([(f"{at:02d}-{good[at][0]}", *good[at][1:])] if at < 7 else [])]
    return rows, Counter(cause for _, cause in bad)


# -------------------------------------------------------------------------------------------------- the sources


def put(root: str, files: dict[str, bytes]) -> None:
    system, path = fsspec.core.url_to_fs(root)
    for name, content in files.items():
        system.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        system.pipe_file(f"{path}/{name}", content)


def pictures_of(rows: list[Row]) -> dict[str, bytes]:
    return {f"{name}.png": raw for name, raw, _ in rows if raw is not None}


def as_csv(root: str, rows: list[Row]) -> str:
    lines = [b"file,caption", *(b"%s.png%s" % (n.encode(), b"" if t is None else b"," + t) for n, _, t in rows)]
    put(root, {**pictures_of(rows), "captions.csv": b"\n".join(lines)})
    return root


def as_jsonl(root: str, rows: list[Row]) -> str:
    lines = [
        b'{"file_name": "%s.png"%s}' % (n.encode(), b"" if t is None else b', "text": "%s"' % t) for n, _, t in rows
    ]
    put(root, {**pictures_of(rows), "metadata.jsonl": b"\n".join(lines)})
    return root


def as_beside(root: str, rows: list[Row]) -> str:
    put(root, {**pictures_of(rows), **{f"{name}.txt": text for name, _, text in rows if text is not None}})
    return root


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def as_tars(root: str, rows: list[Row]) -> str:
    for shard in range(2):
        members = {}
        for name, raw, text in rows[shard * len(rows) // 2 : (shard + 1) * len(rows) // 2]:
            members |= {} if raw is None else {f"{name}.jpg": raw}
            members |= {} if text is None else {f"{name}.txt": text}
        put(root, {f"{shard:05d}.tar": tar_of(members)})
    return root


def conversations(rows: list[Row], between: bytes) -> bytes:
    turn = b'{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "%s"}'
    return between.join(
        b'{"id": "%s", "image": "%s.png"%s}'
        % (n.encode(), n.encode(), b"" if t is None else b', "conversations": [%s]' % (turn % t))
        for n, _, t in rows
    )


def as_llava(root: str, rows: list[Row]) -> str:
    put(root, {**pictures_of(rows), "train.json": b"[\n" + conversations(rows, b",\n ") + b"\n]"})
    return f"{root}/train.json"


def as_llava_lines(root: str, rows: list[Row]) -> str:
    put(root, {**pictures_of(rows), "train.jsonl": conversations(rows, b"\n")})
    return f"{root}/train.jsonl"


def parquet_of(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, write_batch_size=32)  # a page, which is read whole, is a megabyte or so
    return buffer.getvalue()


def strings(values: list[bytes | None]) -> pa.Array:
    """A string column whose bytes nobody has checked."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


def as_parquet(root: str, rows: list[Row]) -> str:
    cells = [{"bytes": raw, "path": None} for _, raw, _ in rows]
    table = parquet_of(id=[n for n, *_ in rows], image=cells, caption=strings([text for *_, text in rows]))
    put(root, {"data/train-00000.parquet": table})
    return root


Builder = Callable[[str, list[Row]], str]
SOURCES: dict[str, tuple[str, Builder]] = {
    "csv": ("folder", as_csv),
    "jsonl": ("folder", as_jsonl),
    "beside": ("folder", as_beside),
    "tars": ("webdataset", as_tars),
    "llava": ("llava", as_llava),
    "llava-lines": ("llava", as_llava_lines),
    "parquet": ("parquet", as_parquet),
    "huggingface": ("huggingface", as_parquet),
}
each_source = pytest.mark.parametrize("kind", SOURCES)


@pytest.fixture
def memory() -> Iterator[str]:
    """An address in memory, empty."""
    yield "memory://set"
    system = fsspec.filesystem("memory")
    system.store.clear()


def texts(reader: ShardReader) -> list[str]:
    words = [reader.words(i) for i in range(len(reader))]
    return [w.short or w.conversation[1]["content"][0] for w in words]


def keys(reader: ShardReader) -> list[str]:
    return [reader.key(i) for i in range(len(reader))]


def assert_holds(reader: ShardReader, rows: list[Row]) -> None:
    """The rows in their order; files as they were, unless shards cannot hold them."""
    assert keys(reader) == [name for name, *_ in rows]
    assert texts(reader) == [text.decode() for *_, text in rows if text is not None]
    for at, (_, raw, _) in enumerate(rows):
        (found,) = reader.pictures(at)
        assert raw is not None
        if raw[:2] == b"II":
            assert found[:4] == b"\x89PNG" and open_image(found).tobytes() == open_image(raw).tobytes()
        else:
            assert found == raw


# ---------------------------------------------------------------------------------------------------- round trips


@each_source
@pytest.mark.parametrize("where", ["path", "file", "memory"])
def test_a_round_trip_keeps_files_texts_and_order(kind: str, where: str, tmp_path: Path, memory: str) -> None:
    format, build = SOURCES[kind]
    root = {"path": f"{tmp_path}/set", "file": f"file://{tmp_path}/set", "memory": memory}[where]
    rows = good_rows()
    told = import_dataset(format, build(root, rows), tmp_path / "out", samples_per_shard=3, licence="CC0")
    reader = ShardReader(tmp_path / "out")
    assert_holds(reader, rows)
    reader.verify()
    assert told["written"] == told["read"] == len(rows) and told["skipped"] == {} and told["offenders"] == {}
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
    assert [row["licence"] for row in reader.licences] == ["CC0"]
    if "llava" in kind:
        assert reader.words(0).conversation[0] == {"role": "user", "content": [{"image": 0}, "What?"]}


@each_source
def test_bad_records_are_skipped_and_counted_and_the_others_stay(kind: str, tmp_path: Path) -> None:
    format, build = SOURCES[kind]
    rows, causes = mixed_rows()
    told = import_dataset(format, build(f"{tmp_path}/set", rows), tmp_path / "out", max_bad=1)
    assert_holds(ShardReader(tmp_path / "out"), [row for row in rows if "-bad-" not in row[0]])
    assert told["skipped"] == causes and told["written"] == 7 and told["read"] == len(rows)
    assert told["offenders"]["shape"] == ["04-bad-dot", "05-bad-line", "06-bad-strip"]
    assert told["offenders"]["missing image"] == ["07-bad-gone"]
    assert len(told["offenders"]["not UTF-8"]) == 1


@each_source
def test_too_many_bad_records_are_fatal_name_the_first_and_leave_nothing(kind: str, tmp_path: Path) -> None:
    format, build = SOURCES[kind]
    rows, causes = mixed_rows()
    with pytest.raises(DatasetImportError, match=r"00-bad-corrupt.*max_bad") as error:
        import_dataset(format, build(f"{tmp_path}/set", rows), tmp_path / "out", max_bad=0.5)
    assert f"{causes.total()} of the first {len(rows)}" in str(error.value)
    assert "shape 3 (04-bad-dot, 05-bad-line, 06-bad-strip)" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_failed_import_keeps_the_dataset_that_was_there(tmp_path: Path) -> None:
    import_dataset("folder", as_csv(f"{tmp_path}/a", good_rows()), tmp_path / "out")
    with pytest.raises(DatasetImportError):
        import_dataset("folder", as_csv(f"{tmp_path}/b", mixed_rows()[0]), tmp_path / "out")
    assert_holds(ShardReader(tmp_path / "out"), good_rows())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ShardError, match="no dataset"):
        import_dataset("folder", f"{tmp_path}/a", tmp_path / "other")


# ---------------------------------------------------------------------------------------------- judging the whole


def endless(bad: set[int], asked: list[int]) -> Iterator[Record | BadRecord]:
    for number in count():
        asked.append(number)
        raw = PICTURES["rgb"]
        yield BadRecord(f"r{number}", "row") if number in bad else Record(f"r{number}", (raw,), short="words")


def test_the_share_is_judged_from_a_hundred_records_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(importing, "read_records", lambda *_: endless({0, 50}, asked))
    with pytest.raises(DatasetImportError, match=r"2 of the first 100 .*row 2 \(r0, r50\)"):
        import_dataset("folder", "x", tmp_path / "out")
    assert len(asked) == 100
    monkeypatch.setattr(importing, "read_records", lambda *_: endless({0, 199}, asked))
    told = import_dataset("folder", "x", tmp_path / "out", limit=200)
    assert told["read"] == 200 and told["written"] == 198 and told["offenders"] == {"row": ["r0", "r199"]}


def test_at_most_five_offenders_of_a_cause_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "read_records", lambda *_: endless(set(range(9)), []))
    told = import_dataset("folder", "x", tmp_path / "out", limit=10, max_bad=0.9)
    assert told["skipped"] == {"row": 9} and told["offenders"] == {"row": ["r0", "r1", "r2", "r3", "r4"]}


def test_keys_are_safe_and_unique(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a/b.c", "a/b.c", "a-b-c-2", "a.b/c", "../..", "猫", "x" * 300, "a\ud800b"]
    records = [Record(name, (PICTURES["rgb"],), short=str(at)) for at, name in enumerate(names)]
    monkeypatch.setattr(importing, "read_records", lambda *_: iter(records))
    import_dataset("folder", "x", tmp_path / "out")
    reader = ShardReader(tmp_path / "out")
    assert keys(reader) == ["a-b-c", "a-b-c-2", "a-b-c-2-2", "a-b-c-3", "sample", "猫", "x" * 150, "a-b"]
    assert texts(reader) == [str(at) for at in range(8)]


def test_half_a_character_written_as_an_escape_is_no_text(tmp_path: Path) -> None:
    put(f"{tmp_path}/set", {"a.png": PICTURES["rgb"], "list.jsonl": rb'{"file": "a.png", "text": "\ud800"}'})
    told = import_dataset("folder", f"{tmp_path}/set", tmp_path / "out", max_bad=1)
    assert told["skipped"] == {"not UTF-8": 1} and told["written"] == 0


def test_what_counts_as_a_shape_is_a_setting(tmp_path: Path) -> None:
    source = as_csv(f"{tmp_path}/set", [("a", picture(size=(16, 12)), b"x"), ("b", picture(size=(60, 12)), b"x")])
    for settings, left in (({"min_side": 13}, []), ({"max_aspect": 4}, ["a"]), ({"max_aspect": 5}, ["a", "b"])):
        import_dataset("folder", source, tmp_path / "out", max_bad=1, **settings)
        assert keys(ShardReader(tmp_path / "out")) == left


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "lava"}, "unknown format 'lava': did you mean llava"),
        ({"format": "zzz"}, "choose one of folder, webdataset"),
        ({"split": "val"}, "split='val': format folder takes only caption_field"),
        ({"caption_field": "captoin"}, "did you mean 'caption'? it holds file, caption"),
        ({"image_field": "nothing"}, "has no field 'nothing': it holds file, caption"),
        ({"max_bad": 2}, "max_bad=2"),
        ({"limit": 0}, "limit=0"),
        ({"min_side": 0}, "min_side=0"),
        ({"source": "/no/such/place"}, "no such folder"),
        ({"source": "quux://place"}, "quux"),
    ],
)
def test_wrong_settings_are_named_with_the_right_ones(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"format": "folder", "source": as_csv(f"{tmp_path}/set", good_rows()), **settings}
    with pytest.raises(DatasetImportError) as error:
        import_dataset(out=tmp_path / "out", **given)
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_says_when_there_is_nothing_and_runs_no_command(format: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetImportError, match=str(tmp_path / "empty")):
        import_dataset(format, str(tmp_path / "empty"), tmp_path / "out")
    for source in (f"pipe:touch {tmp_path}/run", f"simplecache::pipe:touch {tmp_path}/run"):
        with pytest.raises(DatasetImportError, match="commands are not run"):
            import_dataset(format, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


# --------------------------------------------------------------------------------------------------------- folder


def test_names_of_pictures_stay_in_their_folder(tmp_path: Path) -> None:
    inside = f"{tmp_path}/set/sub/a.png"
    put(f"{tmp_path}", {"secret.png": PICTURES["rgb"], "set/sub/a.png": PICTURES["rgb"]})
    names = ["../secret.png", f"{tmp_path}/secret.png", f"file://{tmp_path}/secret.png", "pipe:touch x", "sub", inside]
    put(f"{tmp_path}/set", {"list.csv": "\n".join(["path,text", *(f"{name},x" for name in names)]).encode()})
    told = import_dataset("folder", f"{tmp_path}/set", tmp_path / "out", max_bad=1)
    assert told["skipped"] == {"outside the folder": 3, "missing image": 2} and told["written"] == 1


def test_pictures_may_lie_elsewhere_and_fields_be_named(tmp_path: Path, memory: str) -> None:
    put(memory, {"deep/a.png": PICTURES["rgb"]})
    put(f"{tmp_path}/set", {"my.tsv": b"\xef\xbb\xbfwhere\ten\tlong\ndeep/a.png\tshort, one\t long one\n\n"})
    fields = {"image_field": "where", "caption_field": "en", "detailed_field": "long", "images": memory}
    import_dataset("folder", f"{tmp_path}/set/my.tsv", tmp_path / "out", **fields)
    words = ShardReader(tmp_path / "out").words(0)
    assert (words.key, words.short, words.detailed, words.source) == ("deep-a", "short, one", "long one", "set")


def test_a_list_that_says_nothing_usual_asks_for_its_fields(tmp_path: Path) -> None:
    put(f"{tmp_path}/set", {"my.csv": b"where,en\na.png,x\n"})
    with pytest.raises(DatasetImportError, match=r"image_field\): where, en"):
        import_dataset("folder", f"{tmp_path}/set", tmp_path / "out")
    put(f"{tmp_path}/set", {"other.csv": b"where,en\n"})
    with pytest.raises(DatasetImportError, match="my.csv, other.csv; give the one"):
        import_dataset("folder", f"{tmp_path}/set", tmp_path / "out")


def test_rows_that_are_no_rows_are_counted(tmp_path: Path) -> None:
    put(f"{tmp_path}/a", {"a.png": PICTURES["rgb"], "c.csv": b'file,text\na.png,one, two\na.png,"x"y\na.png,fine\n'})
    told = import_dataset("folder", f"{tmp_path}/a", tmp_path / "out", max_bad=1)
    assert told["skipped"] == {"row": 2} and told["offenders"] == {"row": ["c.csv:2", "c.csv:3"]}
    put(f"{tmp_path}/b", {"a.png": PICTURES["rgb"], "c.jsonl": b'{"file": \n[1]\n{"file": "a.png", "text": "fine"}\n'})
    told = import_dataset("folder", f"{tmp_path}/b", tmp_path / "out", max_bad=1)
    assert told["skipped"] == {"row": 2} and texts(ShardReader(tmp_path / "out")) == ["fine"]


# ----------------------------------------------------------------------------------------------------- webdataset


def test_img2dataset_members_become_texts_and_facts(tmp_path: Path) -> None:
    row = {"caption": "alt text", "recaption": "a long text", "url": "http://x/y.jpg", "license": "CC-BY", "width": 16}
    one = {"000000000.jpg": PICTURES["jpeg"], "000000000.json": json.dumps(row).encode()}
    several = {f"dir/b.{i}.png": picture(i) for i in (10, 2)} | {"dir/b.txt": b"two"}
    put(f"{tmp_path}/set", {"00000.tar": tar_of(one | several)})
    import_dataset("webdataset", f"{tmp_path}/set/*.tar", tmp_path / "out")
    reader = ShardReader(tmp_path / "out")
    words = reader.words(0)
    assert (words.short, words.detailed, words.source) == ("alt text", "a long text", "set")
    assert words.facts == {"url": "http://x/y.jpg", "licence": "CC-BY"}
    assert keys(reader) == ["000000000", "dir-b"] and reader.pictures(1) == [picture(2), picture(10)]
    import_dataset("webdataset", f"{tmp_path}/set", tmp_path / "out", caption_field="recaption", max_bad=1)
    assert texts(ShardReader(tmp_path / "out")) == ["a long text"]
    with pytest.raises(DatasetImportError, match="did you mean 'recaption'"):
        import_dataset("webdataset", f"{tmp_path}/set", tmp_path / "out", caption_field="recaptions")


class Mine:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_links_and_pickles_in_tars_are_passed_over(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        for name, content in (("a.pkl", pickle.dumps(Mine(tmp_path / "run"))), ("a.txt", b"x"), ("b.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    put(f"{tmp_path}/set", {"0.tar": buffer.getvalue()})
    told = import_dataset("webdataset", f"{tmp_path}/set", tmp_path / "out", max_bad=1)
    assert told["skipped"] == {"missing image": 1, "no text": 1} and not (tmp_path / "run").exists()


def test_a_damaged_tar_is_an_error_that_names_it(tmp_path: Path) -> None:
    whole = tar_of({f"{i}.{kind}": PICTURES["rgb"] for i in range(4) for kind in ("png", "txt")})
    middle = 3 * 512 * (1 + -(-len(PICTURES["rgb"]) // 512))
    damaged = whole[:middle] + b"x" * 512 + whole[middle + 512 :]
    for spoiled in (whole[: middle + 700], whole[: middle + 100], damaged, b"", b"no tar" * 300):
        put(f"{tmp_path}/set", {"00007.tar": spoiled})
        with pytest.raises(DatasetImportError, match=r"00007\.tar: cut short, damaged"):
            import_dataset("webdataset", f"{tmp_path}/set", tmp_path / "out", max_bad=1)


# ---------------------------------------------------------------------------------------------------------- llava


@pytest.mark.parametrize(
    ("values", "pictures", "expected"),
    [
        (["<image>\nWhat?", "A cat"], 1, [{"image": 0}, "What?"]),
        (["What?\n<image>", "A cat"], 1, ["What?", {"image": 0}]),
        (["Is <image> like <image>\n?", "Yes"], 2, ["Is ", {"image": 0}, " like ", {"image": 1}, "?"]),
        (["<image>\n<image>", "Two"], 2, [{"image": 0}, {"image": 1}]),
        (["Hello", "Hi"], 0, ["Hello"]),
        (["What?", "A cat"], 1, [{"image": 0}, "What?"]),
        (["<image>\n<image> What?", "A cat"], 1, "placeholders"),
        (["<image> What?", "A cat"], 0, "placeholders"),
        (["<image> What?", "This: <image>"], 2, "placeholders"),
        (["<image> What?", " "], 1, "no text"),
        (["<image> What?", None], 1, "no text"),
        (["<image> What?"], 1, "turns"),
        ([], 0, "no text"),
    ],
)
def test_placeholders_become_pictures_in_their_places(values: list[Any], pictures: int, expected: Any) -> None:
    turns = [{"from": ("human", "gpt")[at % 2], "value": value} for at, value in enumerate(values)]
    names = tuple(f"{at}.png" for at in range(pictures))
    if isinstance(expected, str):
        with pytest.raises(BadRecord) as error:
            conversation(turns, names, "one")
        assert (error.value.name, error.value.cause) == ("one", expected)
    else:
        (asked, answered), found = conversation(turns, names, "one")
        assert found == names
        assert asked == {"role": "user", "content": expected}
        assert answered == {"role": "assistant", "content": [values[1]]}


@pytest.mark.parametrize("roles", [("gpt", "human"), ("human", "human"), ("human", "tool"), ("system", "human")])
def test_turns_alternate_from_the_user_on(roles: tuple[str, str]) -> None:
    with pytest.raises(BadRecord, match="turns"):
        conversation([{"from": role, "value": "x"} for role in roles], (), "one")


def test_pictures_are_counted_over_all_turns_of_a_conversation(tmp_path: Path) -> None:
    put(f"{tmp_path}/coco", {"a.png": picture(1), "b.png": picture(2)})
    says = [("human", "<image>\nOne?"), ("gpt", "Yes"), ("human", "And <image>?"), ("gpt", "No")]
    turns = [{"from": who, "value": value} for who, value in says]
    rows = [
        {"id": "two", "image": ["a.png", "b.png"], "conversations": turns},
        {"id": "three", "image": ["a.png", "b.png", "a.png"], "conversations": turns},
        {"id": 0, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"id": "odd", "image": 3, "conversations": turns},
    ]
    put(f"{tmp_path}/set", {"train.json": json.dumps(rows, indent=2).encode()})
    told = import_dataset("llava", f"{tmp_path}/set", tmp_path / "out", images=f"{tmp_path}/coco", max_bad=1)
    reader = ShardReader(tmp_path / "out")
    assert told["skipped"] == {"placeholders": 1, "missing image": 1} and told["offenders"]["placeholders"] == ["three"]
    assert keys(reader) == ["two", "0"] and reader.pictures(0) == [picture(1), picture(2)] and not reader.pictures(1)
    assert reader.words(0).conversation[2]["content"] == ["And ", {"image": 1}, "?"]
    assert len(reader[1].conversation) == 2 and reader[1].source == "train"


ARRAY = r'[ {"a": "]}\"{[", "b": [1, {"c": "\\"}]} , null, {"d": }, 7,"s,[", [2], {"e": "猫\u732b"}]'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_an_array_is_cut_into_elements_wherever_its_pieces_end(
    size: int, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", size)
    put(memory, {"x.json": ARRAY.encode()})
    found = list(json_rows.json_rows(place(f"{memory}/x.json")))
    good = [row for row in found if not isinstance(row, BadRecord)]
    assert good == [{"a": ']}"{[', "b": [1, {"c": "\\"}]}, {"e": "猫猫"}]
    assert [isinstance(row, BadRecord) for row in found] == [False, True, True, True, True, False]
    put(memory, {"cut.json": ARRAY.encode()[:-1]})
    with pytest.raises(DatasetImportError, match=r"cut\.json: the JSON array does not end"):
        list(json_rows.json_rows(place(f"{memory}/cut.json")))


def test_an_element_without_an_end_does_not_fill_the_memory(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", 100)
    monkeypatch.setattr(json_rows, "_LARGEST", 1000)
    put(memory, {"x.json": b'[{"a": [1}' + b', {"b": 2}' * 1000 + b"]"})
    with pytest.raises(DatasetImportError, match="an element that does not end"):
        list(json_rows.json_rows(place(f"{memory}/x.json")))


# --------------------------------------------------------------------------------------------------------- tables

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat"}]


def test_cells_may_be_files_names_or_lists_of_them(tmp_path: Path) -> None:
    put(f"{tmp_path}/coco", {"a.png": picture(1), "b.png": picture(2)})
    cells: dict[str, list[Any]] = {
        "bytes": [picture(1), picture(2), None],
        "names": ["a.png", "b.png", "c.png"],
        "lists": [[picture(1), picture(2)], [picture(2)], []],
        "structs": [
            {"bytes": picture(1), "path": "z"},
            {"bytes": None, "path": "b.png"},
            {"bytes": None, "path": None},
        ],
    }
    for name, values in cells.items():
        table = parquet_of(pic=values, caption=["one", "two", "three"], licence=["CC0", None, None])
        put(f"{tmp_path}/{name}", {"x.parquet": table})
        fields = {"image_field": "pic", "images": f"{tmp_path}/coco"}
        told = import_dataset("parquet", f"{tmp_path}/{name}", tmp_path / "out", max_bad=0.5, **fields)
        reader = ShardReader(tmp_path / "out")
        assert told["skipped"] == {"missing image": 1}
        assert [reader.pictures(0)[0], reader.pictures(1)[0]] == [picture(1), picture(2)]
        assert keys(reader) == ["x-00000000", "x-00000001"] and reader.words(0).facts == {"licence": "CC0"}


def test_pixelprose_finds_its_files_and_drops_the_lead(tmp_path: Path) -> None:
    table = parquet_of(
        uid=["u1", "u2", "../u3"],
        key=["000010000", "000010001", "x"],
        url=["http://a", "http://b", "http://c"],
        original_caption=["alt 1", "alt 2", "alt 3"],
        vlm_caption=[" This image displays: A cat.", "A dog. This image displays: no lead.", "x"],
    )
    put(f"{tmp_path}/set", {"00000.parquet": table})
    put(f"{tmp_path}/pictures", {"u1.png": picture(1), "00001/000010001.jpg": picture(2, "JPEG")})
    told = import_dataset("pixelprose", f"{tmp_path}/set", tmp_path / "out", images=f"{tmp_path}/pictures", max_bad=0.5)
    reader = ShardReader(tmp_path / "out")
    assert keys(reader) == ["u1", "u2"] and told["skipped"] == {"outside the folder": 1}
    assert [reader.words(i).detailed for i in (0, 1)] == ["A cat.", "A dog. This image displays: no lead."]
    assert texts(reader) == ["alt 1", "alt 2"] and reader.words(0).facts == {"url": "http://a"}
    assert [reader.pictures(i) for i in (0, 1)] == [[picture(1)], [picture(2, "JPEG")]]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_cambrian_is_read_from_tables_and_lines(ending: str, tmp_path: Path) -> None:
    put(f"{tmp_path}/coco", {"deep/a.png": picture(1)})
    rows = [
        {"id": "1", "image": "deep/a.png", "conversations": TURNS},
        {"id": "2", "image": "b", "conversations": TURNS},
    ]
    content = "\n".join(map(json.dumps, rows)).encode()
    if ending == "parquet":
        content = parquet_of(**{name: [row[name] for row in rows] for name in rows[0]})
    put(f"{tmp_path}/set", {f"x.{ending}": content})
    told = import_dataset("cambrian", f"{tmp_path}/set", tmp_path / "out", images=f"{tmp_path}/coco", max_bad=0.5)
    reader = ShardReader(tmp_path / "out")
    assert told["skipped"] == {"missing image": 1} and keys(reader) == ["1"] and reader.pictures(0) == [picture(1)]
    assert reader.words(0).conversation[0]["content"] == [{"image": 0}, "What?"]


def test_onevision_holds_pictures_and_says_where_each_is_from(tmp_path: Path) -> None:
    columns = {
        "id": ["a", "b", "c"],
        "image": [{"bytes": picture(1), "path": "1.png"}, None, {"bytes": picture(3), "path": None}],
        "conversations": [TURNS, TURNS, [{**TURNS[0], "value": "no place"}, TURNS[1]]],
        "data_source": ["ureader", "ureader", "other"],
    }
    put(f"{tmp_path}/set", {"x.parquet": parquet_of(**columns)})
    told = import_dataset("onevision", f"{tmp_path}/set", tmp_path / "out", max_bad=1)
    reader = ShardReader(tmp_path / "out")
    assert told["skipped"] == {"placeholders": 1} and told["offenders"] == {"placeholders": ["b"]}
    assert keys(reader) == ["a", "c"] and reader.words(0).source == "ureader" and reader.pictures(0) == [picture(1)]
    structs = {name: [turn[name] for turn in TURNS] for name in ("from", "value")}
    assert conversation(structs, ("1.png",), "one")[0] == reader.words(0).conversation


def test_a_table_without_usual_columns_asks_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    put(f"{tmp_path}/set", {"x.parquet": parquet_of(photo=[picture()], words=["x"])})
    for settings, message in (({}, r"caption_field\): photo, words"), ({"caption_field": "words"}, "image_field")):
        with pytest.raises(DatasetImportError, match=message):
            import_dataset("parquet", f"{tmp_path}/set", tmp_path / "out", **settings)
    with pytest.raises(DatasetImportError, match="did you mean 'photo'"):
        import_dataset("parquet", f"{tmp_path}/set", tmp_path / "out", image_field="photos", caption_field="words")
    whole = parquet_of(image=[picture(i) for i in range(9)], text=["x"] * 9)
    for spoiled in (whole[:-20], whole[:8] + b"x" * 900 + whole[908:], b""):
        put(f"{tmp_path}/set", {"x.parquet": spoiled})
        with pytest.raises(DatasetImportError, match=r"x\.parquet: cut short"):
            import_dataset("parquet", f"{tmp_path}/set", tmp_path / "out")


def test_a_split_of_a_hugging_face_dataset_is_chosen(tmp_path: Path) -> None:
    for name, seed in (("train", 1), ("test", 2)):
        table = parquet_of(image=[{"bytes": picture(seed), "path": "x.png"}], text=[name])
        put(f"{tmp_path}/set", {f"data/{name}-00000-of-00001.parquet": table})
    for split, seed in (("", 1), ("train", 1), ("test", 2)):
        import_dataset("huggingface", f"{tmp_path}/set", tmp_path / "out", split=split)
        assert ShardReader(tmp_path / "out").pictures(0) == [picture(seed)]
    with pytest.raises(DatasetImportError, match=r"no split 'val'; it has .*test"):
        import_dataset("huggingface", f"{tmp_path}/set", tmp_path / "out", split="val")
    with pytest.raises(DatasetImportError, match=r"no split 'val'"):
        import_dataset("huggingface", as_jsonl(f"{tmp_path}/pictures", good_rows()), tmp_path / "out", split="val")
    with pytest.raises(DatasetImportError, match="no/such-set"):
        import_dataset("huggingface", "no/such-set", tmp_path / "out")


def test_the_library_reads_what_is_no_parquet(tmp_path: Path) -> None:
    rows = [row for row in good_rows() if "tiff" not in row[0]]
    import_dataset("huggingface", as_jsonl(f"{tmp_path}/set", rows), tmp_path / "out")
    reader = ShardReader(tmp_path / "out")
    assert texts(reader) == [text.decode() for *_, text in rows if text is not None]
    assert [reader.pictures(at)[0] for at in range(len(rows))] == [raw for _, raw, _ in rows]
    assert keys(reader)[0] == "set-00000000"


# ---------------------------------------------------------------------------------------------------------- memory


class Counting(io.BytesIO):
    """A file that knows how much of it was read."""

    taken = 0

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        type(self).taken += len(found)
        return found

    read1 = read


def many(number: int = 2000) -> list[Row]:
    return [(f"{i:05d}", PICTURES["rgb"], b"word " * 40) for i in range(number)]


def watched(kind: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Iterator[Record | BadRecord], int]:
    """The records of a large source, and its size; what is read of it is counted."""
    format, build = SOURCES[kind]
    source = build(memory, many())
    size = max(info["size"] for info in fsspec.filesystem("memory").find("/set", detail=True).values())
    monkeypatch.setattr(Place, "open", lambda self, *_: Counting(self.system.cat_file(self.root)))
    monkeypatch.setattr(Counting, "taken", 0)
    monkeypatch.setattr(json_rows, "_CHUNK", 8192)
    return read_records(source, Options(format)), size


@pytest.mark.parametrize("kind", ["csv", "jsonl", "tars", "llava", "llava-lines"])
def test_little_is_read_for_the_first_record(kind: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records, size = watched(kind, memory, monkeypatch)
    assert isinstance(next(iter(records)), Record)
    assert 0 < Counting.taken < size / 4
    assert sum(1 for _ in records) == 1999
    assert Counting.taken >= size


@pytest.mark.parametrize("kind", ["tars", "llava", "llava-lines"])
def test_records_are_not_kept(kind: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records, size = watched(kind, memory, monkeypatch)
    monkeypatch.setattr(Place, "open", lambda self, *_: self.system.open(self.root))
    monkeypatch.setattr(webdataset, "_BUFFER", 1 << 13)
    next(iter(records))  # what is imported and compiled on first use
    tracemalloc.start()
    try:
        assert sum(1 for _ in records) == 1999
        assert tracemalloc.get_traced_memory()[1] < size / 4
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format", ["parquet", "huggingface"])
def test_a_table_is_read_some_rows_at_a_time(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).bytes(8 << 20)
    table = parquet_of(image=[noise[at : at + 8192] for at in range(0, 8 << 20, 8192)], caption=["x"] * 1024)
    put(f"{tmp_path}/set", {"x.parquet": table})
    before = pa.total_allocated_bytes()
    records = iter(read_records(f"{tmp_path}/set", Options(format)))
    for _ in range(40):
        next(records)
    assert pa.total_allocated_bytes() - before < 4 << 20
    monkeypatch.setattr(Place, "open", lambda self, *_: Counting(self.system.cat_file(self.root)))
    monkeypatch.setattr(Counting, "taken", 0)
    next(iter(read_records(f"{tmp_path}/set", Options("parquet"))))
    assert 0 < Counting.taken < len(table) / 3
