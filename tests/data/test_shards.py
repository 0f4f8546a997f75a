"""Datasets on disk: whole or absent, any sample in one seek, damage named."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from open_pisces.batch import Question, Sample
from open_pisces.data import shards
from open_pisces.data.order import stream
from open_pisces.data.shards import DamagedSample, ShardError, ShardReader, data_path, open_dataset
from open_pisces.datasets.indexing import index_folder
from open_pisces.datasets.look import look
from open_pisces.datasets.shard_writer import ShardWriter

FIXTURE = data_path("fixture/train")


def sample(number: int, pictures: int = 1) -> Sample:
    rng = np.random.default_rng(number)
    images = tuple(Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(pictures))
    turn = {"role": "user", "content": [{"image": 0}, "naïve 猫 \n?"]}
    return Sample(
        key=f"k{number}",
        images=images,
        short=f"short {number}",
        detailed="détail",
        questions=(Question("q?", "a", "what"), Question("r?", "b")),
        conversation=(turn,) if pictures else (),
        source="test",
        facts={"box": [0, 1, 2, 3]} if number % 2 else None,
    )


def fields(one: Sample) -> tuple[object, ...]:
    pixels = tuple(image.tobytes() for image in one.images)
    return (one.key, pixels, one.short, one.detailed, one.questions, one.conversation, one.source, one.facts)


def write(folder: Path, samples: list[Sample], per_shard: int = 3) -> ShardReader:
    with ShardWriter(folder, per_shard, [{"licence": "MIT"}]) as writer:
        for one in samples:
            writer.write(one)
    return ShardReader(folder)


def test_what_is_written_is_read_in_any_order(tmp_path: Path) -> None:
    samples = [sample(i, pictures=i % 3) for i in range(10)]
    reader = write(tmp_path / "set", samples)
    assert len(reader) == 10 and len(list((tmp_path / "set").glob("*.tar"))) == 4
    for i in (9, 0, 5, 3, 3, 8, 1):
        assert fields(reader[i]) == fields(samples[i])
        assert reader.text(i)["short"] == samples[i].short and reader.text(i)["key"] == samples[i].key
    assert reader.licences == [{"licence": "MIT"}]
    reader.verify()


def test_shards_are_plain_tars_in_the_known_layout(tmp_path: Path) -> None:
    write(tmp_path / "set", [sample(0), sample(1, pictures=2)])
    with tarfile.open(tmp_path / "set" / "00000.tar") as tar:
        assert tar.getnames() == ["k0.png", "k0.json", "k1.0.png", "k1.1.png", "k1.json"]
        raw = tar.extractfile("k1.1.png")
        assert raw is not None and Image.open(io.BytesIO(raw.read())).tobytes() == sample(1, 2).images[1].tobytes()


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, [sample(i) for i in range(4)])
    files = [file for file in (tmp_path / "a").rglob("*") if file.is_file()]
    assert len(files) == 6
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


def test_an_error_leaves_nothing_and_keeps_the_older_dataset(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        with pytest.raises(RuntimeError), ShardWriter(folder) as writer:
            writer.write(sample(7))
            raise RuntimeError("stop")

    fail(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "old", [sample(0)])
    fail(tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert ShardReader(tmp_path / "old")[0].key == "k0"


def test_a_new_dataset_replaces_the_older_one_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "set", [sample(i) for i in range(7)])
    assert len(write(tmp_path / "set", [sample(9)])) == 1
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["00000.tar", "index", "index.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(ShardError, match="mine is there and is no dataset"):
        ShardWriter(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "../x", "k0"])
def test_wrong_and_repeated_keys_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ShardError, match="keys are unique"), ShardWriter(tmp_path / "set") as writer:
        writer.write(sample(0))
        writer.write(Sample(key, ()))
    assert not (tmp_path / "set").exists()


def test_every_damaged_byte_of_a_sample_is_noticed(tmp_path: Path) -> None:
    reader = write(tmp_path / "set", [sample(0), sample(1)])
    path = tmp_path / "set" / "00000.tar"
    whole = path.read_bytes()
    members = reader._members_of(1).tolist()
    assert [size for _, size, _, _ in members] == [len(reader.pictures(1)[0]), len(_json_of(reader, 1))]
    for offset, size, _, _ in members:
        for at in (offset, offset + size // 2, offset + size - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(DamagedSample, match="00000.tar: sample 'k1' is damaged") as caught:
                ShardReader(reader.folder)[1]
            assert caught.value.cause == "checksum"
            assert ShardReader(reader.folder)[0].key == "k0"  # its neighbour is as good as ever
            with pytest.raises(ShardError, match="SHA-256"):
                ShardReader(reader.folder).verify()


def _json_of(reader: ShardReader, index: int) -> bytes:
    with tarfile.open(Path(str(reader.folder)) / "00000.tar") as tar:
        member = tar.extractfile(f"{reader.key(index)}.json")
        assert member is not None
        return member.read()


def test_missing_and_short_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no dataset at .*nowhere: build one .* import one .* or index"):
        ShardReader(tmp_path / "nowhere")
    write(tmp_path / "set", [sample(0)])
    tar, index = tmp_path / "set" / "00000.tar", tmp_path / "set" / "index.json"
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(ShardError, match="00000.tar is of 10239 bytes, the index says 10240"):
        ShardReader(tmp_path / "set")
    tar.unlink()
    with pytest.raises(ShardError, match="00000.tar is missing"):
        ShardReader(tmp_path / "set")
    index.write_text('{"version": 1}')
    with pytest.raises(ShardError, match="version 1, not 2: run `pisces data index"):
        ShardReader(tmp_path / "set")
    index.write_text("{")
    with pytest.raises(ShardError, match="index.json is damaged"):
        ShardReader(tmp_path / "set")


@pytest.mark.parametrize("table", ["samples", "members", "keys"])
def test_tables_that_are_missing_cut_short_or_of_another_dataset_are_named(tmp_path: Path, table: str) -> None:
    write(tmp_path / "set", [sample(i) for i in range(3)])
    write(tmp_path / "other", [sample(i) for i in range(5)])
    path = tmp_path / "set" / "index" / f"{table}.npy"
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], pickle.dumps([1])):
        path.write_bytes(content)
        with pytest.raises(ShardError, match=f"index/{table}.npy: cannot be read"):
            ShardReader(tmp_path / "set")
    path.unlink()
    with pytest.raises(ShardError, match=f"index/{table}.npy: cannot be read"):
        ShardReader(tmp_path / "set")
    path.write_bytes((tmp_path / "other" / "index" / f"{table}.npy").read_bytes())
    with pytest.raises(ShardError, match="the tables do not fit index.json"):
        ShardReader(tmp_path / "set")


def test_pictures_given_as_files_are_kept_byte_for_byte(tmp_path: Path) -> None:
    picture = sample(0).images[0]
    files = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        files.append(buffer.getvalue())
    with ShardWriter(tmp_path / "set") as writer:
        writer.write(Sample("all", ()), tuple(files))
        with pytest.raises(ShardError, match="no PNG, JPEG, WebP or GIF"):
            writer.write(Sample("bad", ()), (b"BM....",))
    reader = ShardReader(tmp_path / "set")
    assert reader.pictures(0) == files and [image.size for image in reader[0].images] == [(8, 8)] * 4
    assert len(reader) == 1
    with tarfile.open(tmp_path / "set" / "00000.tar") as tar:
        assert tar.getnames() == ["all.0.png", "all.1.jpg", "all.2.webp", "all.3.gif", "all.json"]


def test_digests_follow_the_bytes_they_stand_for(tmp_path: Path) -> None:
    plain = write(tmp_path / "a", [sample(0), sample(1)])
    words = write(tmp_path / "b", [sample(0), replace(sample(1), short="other words")])
    pixels = write(tmp_path / "c", [sample(0), replace(sample(1), images=sample(2).images)])
    moved = write(tmp_path / "d", [replace(sample(0), images=()), replace(sample(1), images=sample(0).images * 2)])
    assert len({plain.digest, words.digest, pixels.digest, moved.digest}) == 4
    assert plain.image_digest == words.image_digest == write(tmp_path / "e", [sample(0), sample(1)]).image_digest
    assert len({plain.image_digest, pixels.image_digest, moved.image_digest}) == 3
    assert moved.picture_counts().tolist() == [0, 2]


# ---------------------------------------------------------------------------------- addresses and foreign shards


def test_a_dataset_behind_an_address_reads_as_the_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [sample(i, pictures=i % 3) for i in range(10)]
    local = write(tmp_path / "set", samples, per_shard=4)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "set"), "/far/set", recursive=True)
    monkeypatch.setattr(shards, "_READ_AHEAD", 1500)  # members lie across blocks, and blocks are dropped again
    monkeypatch.setattr(shards, "_KEPT_BLOCKS", 2)
    for address in ("memory://far/set", f"file://{tmp_path}/set"):
        reader = pickle.loads(pickle.dumps(ShardReader(address)))
        assert len(reader) == 10 and reader.digest == local.digest
        for i in (9, 0, 5, 3, 3, 8, 1):
            assert fields(reader[i]) == fields(samples[i])
        reader.verify()
    assert len(open_dataset("memory://far/set")) == len(open_dataset(tmp_path / "set")) == 10
    with pytest.raises(ShardError, match="no dataset at memory://far/nothing"):
        ShardReader("memory://far/nothing")
    with pytest.raises(ShardError, match="pipe:.*give a folder or an address"):
        ShardReader("pipe://cat x")
    memory.pipe_file("/far/set/00001.tar", b"short")
    with pytest.raises(ShardError, match="00001.tar is of 5 bytes"):
        ShardReader("memory://far/set")


def foreign_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def encoded(number: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    sample(number).images[0].save(buffer, kind)
    return buffer.getvalue()


def test_foreign_shards_are_read_in_place_once_indexed(tmp_path: Path) -> None:
    meta = json.dumps({"caption": "from json", "recaption": " long one "}).encode()
    foreign_tar(tmp_path / "00000.tar", [
        ("./000000000.jpg", encoded(0)), ("./000000000.txt", b"first "), ("./000000000.json", meta),
        ("000000001.webp", encoded(1, "WEBP")), ("000000001.txt", b"second"), ("000000001.npy", b"ignored"),
    ])  # fmt: skip
    foreign_tar(tmp_path / "00001.tar", [("a/2.seg.png", encoded(2, "PNG")), ("a/2.txt", b"third"), ("b/2.cls", b"0")])
    before = (tmp_path / "00000.tar").read_bytes()
    found = index_folder(tmp_path, {"short": "txt", "detailed": "recaption"}, [{"licence": "CC0"}])
    assert found == {"samples": 3, "shards": 2, "skipped": {"no text": 1}}
    reader = ShardReader(tmp_path)
    assert [reader.key(i) for i in range(3)] == ["000000000", "000000001", "a-2"]
    assert [(s.short, s.detailed) for s in map(reader.__getitem__, range(3))] == [
        ("first", "long one"), ("second", ""), ("third", ""),
    ]  # fmt: skip
    assert reader.pictures(0) == [encoded(0)] and reader.licences == [{"licence": "CC0"}]
    assert (tmp_path / "00000.tar").read_bytes() == before
    assert index_folder(tmp_path)["samples"] == 3 and ShardReader(tmp_path)[1].short == "second"  # keeps its fields


def test_a_header_that_is_damaged_in_the_middle_does_not_hide_what_follows(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "x.tar", [(f"{n}.{kind}", b"some text") for n in range(6) for kind in ("txt", "cls")])
    whole = bytearray((tmp_path / "x.tar").read_bytes())
    whole[512 * 8 + 150] ^= 1  # in the checksum of the fifth header
    (tmp_path / "x.tar").write_bytes(whole)
    with pytest.raises(ShardError, match="x.tar: cut short .*no header where one should be, at byte 4096"):
        index_folder(tmp_path)


def test_the_companions_of_macos_are_no_samples(tmp_path: Path) -> None:
    names = ["._1.jpg", "1.jpg", "._1.json", "1.json", ".DS_Store", "a/._2.txt", "a/2.txt"]
    foreign_tar(tmp_path / "x.tar", [(name, encoded(0) if name.endswith("jpg") else b"{}") for name in names])
    assert index_folder(tmp_path) == {"samples": 2, "shards": 1, "skipped": {}}
    assert ShardReader(tmp_path).key(1) == "a-2" and len(ShardReader(tmp_path).pictures(0)) == 1


def test_more_shards_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN_FILES", 3)
    reader = write(tmp_path / "set", [sample(i) for i in range(10)], per_shard=1)
    assert [reader[i].key for i in (*range(10), 0, 9, 4)] == [f"k{i}" for i in (*range(10), 0, 9, 4)]
    assert len(reader._files) == 3


def test_another_choice_of_fields_is_another_digest(tmp_path: Path) -> None:
    foreign_tar(tmp_path / "x.tar", [("1.json", b'{"caption": "a", "long": "b"}')])
    digests = set()
    for fields_ in ({}, {"short": "caption"}, {"short": "long"}):
        index_folder(tmp_path, fields_)
        digests.add(ShardReader(tmp_path).digest)
    assert len(digests) == 3


def test_the_index_of_our_own_shards_can_be_made_anew(tmp_path: Path) -> None:
    reader = write(tmp_path / "set", [sample(i, pictures=i % 3) for i in range(8)])
    files = {file: file.read_bytes() for file in (tmp_path / "set").rglob("*") if file.is_file()}
    shutil.rmtree(tmp_path / "set" / "index")
    index_folder(tmp_path / "set")
    assert {file: file.read_bytes() for file in files} == files and ShardReader(reader.folder)[7].key == "k7"


def test_tars_that_cannot_be_indexed_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds no .tar files"):
        index_folder(tmp_path)
    foreign_tar(tmp_path / "x.tar", [("a.jpg", encoded(0) * 9), ("a.txt", b"one")])
    whole = (tmp_path / "x.tar").read_bytes()
    for content in (whole[:3000], b"no tar at all" * 100, b""):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(ShardError, match="x.tar: cut short or no tar|no sample in 1 tar"):
            index_folder(tmp_path)
        assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    ("content", "cause"),
    [({"a.jpg": b"\xff\xd8\xff broken", "a.txt": b"x"}, "image"), ({"a.jpg": b"", "a.txt": b"x"}, "image"),
     ({"a.txt": b"\xff\xfe\xfa", "a.jpg": encoded(0)}, "text"), ({"a.json": b"{", "a.jpg": encoded(0)}, "text"),
     ({"a.json": b"[1]", "a.jpg": encoded(0)}, "text"), ({"a.json": b'{"questions": [{"q": 1}]}'}, "text")],
)  # fmt: skip
def test_what_cannot_be_read_of_a_sample_has_a_cause(tmp_path: Path, content: dict[str, bytes], cause: str) -> None:
    foreign_tar(tmp_path / "x.tar", [*content.items(), ("b.jpg", encoded(1)), ("b.txt", b"fine")])
    index_folder(tmp_path, {"short": "txt"} if "a.txt" in content else {})
    with pytest.raises(DamagedSample, match="'a'") as caught:
        ShardReader(tmp_path)[0]
    assert caught.value.cause == cause and ShardReader(tmp_path)[1].key == "b"
    assert pickle.loads(pickle.dumps(caught.value)).cause == cause  # as it crosses from a worker


def test_a_reader_survives_pickling_with_open_files() -> None:
    reader = ShardReader(FIXTURE)
    first = fields(reader[0])
    raw = pickle.dumps(reader)
    del reader  # closes its files: what the copy reads from is its own
    assert fields(pickle.loads(raw)[0]) == first


def test_data_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISCES_DATA", str(tmp_path))
    assert data_path("scenes/train") == tmp_path / "scenes" / "train"
    assert data_path("/x/y") == Path("/x/y")
    assert data_path("fixture").name == "fixture" and data_path("fixture/pairs").parent == data_path("fixture")
    monkeypatch.delenv("PISCES_DATA")
    monkeypatch.chdir(tmp_path)
    assert data_path("scenes") == tmp_path / "data" / "scenes"


def test_the_fixture_is_small_whole_and_licensed() -> None:
    files = [path for path in data_path("fixture").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    sizes = {}
    for split in ("train", "pairs"):
        reader = ShardReader(data_path(f"fixture/{split}"))
        reader.verify()
        sizes[split] = len(reader)
        assert {row["licence"] for row in reader.licences} == {"Apache-2.0", "MIT", "CC-BY-4.0"}
        assert all(row["attribution"] for row in reader.licences)
    assert sizes == {"train": 160, "pairs": 40}


def test_look_writes_a_sheet_and_refuses_a_missing_folder(tmp_path: Path) -> None:
    sheet = look("fixture/train", tmp_path / "sheet.png", count=5, columns=3)
    picture = Image.open(sheet)
    assert picture.width > 3 * 128 and picture.height > 2 * 128
    with pytest.raises(ShardError, match="folder .*nowhere does not exist"):
        look("fixture/train", tmp_path / "nowhere" / "sheet.png")
    with pytest.raises(ShardError, match="no dataset at"):
        look(str(tmp_path / "nothing"), tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


# ------------------------------------------------------------------------------------ draws by purpose

PURPOSES = st.lists(st.one_of(st.integers(-(10**12), 10**12), st.text(max_size=6)), max_size=4)


@settings(max_examples=200, deadline=None)
@given(PURPOSES, PURPOSES)
def test_streams_differ_exactly_where_purposes_do(one: list[object], other: list[object]) -> None:
    same = stream(3, *one).integers(0, 2**63, 2).tolist() == stream(3, *other).integers(0, 2**63, 2).tolist()
    assert same == (one == other)


def test_a_stream_is_fixed_for_good() -> None:
    assert stream(0, "order", 1, 2).integers(0, 1000, 4).tolist() == GOLDEN
    assert stream(0, "order", np.int64(1), 2).integers(0, 1000, 4).tolist() == GOLDEN
    for wrong in (1.0, None, ("a",)):
        with pytest.raises(TypeError, match="words and whole numbers"):
            stream(0, wrong)


GOLDEN = [733, 573, 580, 270]
