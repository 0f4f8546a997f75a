"""Datasets on disk: whole or absent, any sample in one seek, damage named."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from open_pisces.batch import Question, Sample
from open_pisces.data.draws import stream
from open_pisces.data.look import look
from open_pisces.data.shards import ShardError, ShardReader, ShardWriter, data_path

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
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


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
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["00000.tar", "index.json"]
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
    shard, _, members = json.loads((tmp_path / "set" / "index.json").read_text())["samples"][1]
    for name, offset, size, _ in members:
        for at in (offset, offset + size // 2, offset + size - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(ShardError, match=f"00000.tar: member {name} is damaged"):
                ShardReader(reader.folder)[1]
            assert ShardReader(reader.folder)[0].key == "k0"  # its neighbour is as good as ever
            with pytest.raises(ShardError, match="SHA-256"):
                ShardReader(reader.folder).verify()


def test_missing_and_short_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no dataset at .*nowhere: build it with `pisces data build scenes`"):
        ShardReader(tmp_path / "nowhere")
    write(tmp_path / "set", [sample(0)])
    tar, index = tmp_path / "set" / "00000.tar", tmp_path / "set" / "index.json"
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(ShardError, match="00000.tar is of 10239 bytes, the index says 10240"):
        ShardReader(tmp_path / "set")
    tar.unlink()
    with pytest.raises(ShardError, match="00000.tar is missing"):
        ShardReader(tmp_path / "set")
    index.write_text('{"version": 2}')
    with pytest.raises(ShardError, match="version 2"):
        ShardReader(tmp_path / "set")
    index.write_text("{")
    with pytest.raises(ShardError, match="index.json is damaged"):
        ShardReader(tmp_path / "set")


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
