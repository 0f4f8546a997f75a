"""Packing, and the batches of a step: nothing lost, nothing leaks, every process agrees, damage leaves a hole."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build_pisces
from PIL import Image

from open_pisces.batch import Question, Sample, SequenceBatch, Skip, StepBatches
from open_pisces.config import DataConfig, ModelConfig, SourceConfig
from open_pisces.data import lengths as data_lengths
from open_pisces.data.lengths import COLUMNS, check_lengths, token_table
from open_pisces.data.loader import (
    PackingError,
    PairLoader,
    SequenceLoader,
    SkipTally,
    TooManyDamaged,
    first_fit_decreasing,
    pack,
)
from open_pisces.data.order import Mixture
from open_pisces.data.prefetch import prefetch
from open_pisces.data.prompts import LengthError, Renderer
from open_pisces.data.shards import ShardError, ShardReader
from open_pisces.data.tokenizer import byte_tokenizer
from open_pisces.datasets.indexing import index_folder
from open_pisces.datasets.shard_writer import ShardWriter
from open_pisces.model.pisces import Pisces, block_mask, with_blank_pictures
from open_pisces.recipe import load_config
from open_pisces.settings import ConfigError

TASKS: Any = {"generate_short": 1.0, "generate_detailed": 1.0, "question": 1.0, "caption_short": 1.0}
RENDERER = Renderer(byte_tokenizer("tiny"), "tiny", 16, 4)


def data(**settings: Any) -> DataConfig:
    return DataConfig(sources=[SourceConfig(path="fixture/train", tasks=TASKS)], **settings)


def loader(config: DataConfig, batch_size: int = 24, **settings: Any) -> SequenceLoader:
    return SequenceLoader(Mixture(config, 3), RENDERER, config, 3, batch_size, 2, (32, 32), multiple=8, **settings)


# ---------------------------------------------------------------------------------------------------- packing

LENGTHS = st.lists(st.integers(1, 64), max_size=60)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(64, 200))
def test_every_sample_is_in_one_row_and_none_is_too_full(lengths: list[int], capacity: int) -> None:
    for rows, length in ((first_fit_decreasing(lengths, capacity), capacity), pack(lengths, capacity)):
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(0 < sum(lengths[i] for i in row) <= length <= capacity for row in rows)
    # First fit: no two rows are at most half full.
    assert sum(lengths) / capacity <= len(first_fit_decreasing(lengths, capacity)) <= 2 * sum(lengths) / capacity + 1


@settings(max_examples=100, deadline=None)
@given(LENGTHS.filter(bool), st.integers(64, 200))
def test_rows_have_the_length_that_wastes_least(lengths: list[int], capacity: int) -> None:
    rows, length = pack(lengths, capacity, multiple=8)
    assert length % 8 == 0 or length == capacity
    for other in {capacity, *range(capacity // 8 * 8, max(*lengths, capacity // 2, 1) - 1, -8)}:
        assert len(rows) * length <= len(first_fit_decreasing(lengths, other)) * other


def test_a_large_batch_is_nearly_all_tokens() -> None:
    lengths = np.random.default_rng(0).integers(30, 125, 64).tolist()
    for row_length in (256, 512):
        rows, length = pack(lengths, row_length)
        assert sum(lengths) / (len(rows) * length) > 0.95


def test_first_fit_takes_the_longest_first_and_the_first_row_with_room() -> None:
    assert first_fit_decreasing([3, 6, 4, 2, 5], 10) == [[1, 2], [4, 0, 3]]
    assert pack([], 64) == ([], 8)
    with pytest.raises(PackingError, match="a sample of 65 tokens, rows have 64: raise data.row_length"):
        first_fit_decreasing([3, 65], 64)


# ------------------------------------------------------------------------------------------- packed equals apart


def pisces() -> Pisces:
    torch.manual_seed(0)
    model = load_config("nano/stage1").model
    torch.manual_seed(1)
    return build_pisces(model, len(RENDERER.tokenizer)).eval()


def nano_loader(config: DataConfig, model: ModelConfig, **settings: Any) -> SequenceLoader:
    built = pisces()
    renderer = Renderer(RENDERER.tokenizer, "tiny", built.understanding_encoder.vectors, model.generation.vectors)
    sizes = built.understanding_encoder.image_size, model.generation.image_size
    return SequenceLoader(Mixture(config, 3), renderer, config, 3, 12, 2, sizes, multiple=8, **settings)


def gradients(model: Pisces, batches: list[SequenceBatch]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    model.zero_grad()
    totals: Counter[str] = Counter()
    for batch in batches:
        losses = model(batch)
        losses.loss.backward()
        totals.update({name: value.item() for name, value in losses.parts.items()})
    return dict(totals), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_packed_losses_and_gradients_equal_unpacked_ones() -> None:
    config, model = load_config("nano/stage1").model, pisces()
    for name in ("understanding_encoder", "generation_encoder", "decoder"):
        getattr(model, name).requires_grad_(False)
    for step in (0, 1):
        apart = nano_loader(data(), config)(step)
        packed = nano_loader(data(row_length=512, rows=1), config)(step)
        assert len(packed.batches) >= 2 and packed.all_tokens < apart.all_tokens
        assert packed.real_tokens == apart.real_tokens
        (losses, one), (others, two) = (gradients(model, step.with_totals()) for step in (apart, packed))
        assert losses == pytest.approx(others, rel=1e-5) and min(losses.values()) > 0
        for name, gradient in one.items():
            torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_sample_changes_no_other_sample_of_its_row() -> None:
    config, model = load_config("nano/stage1").model, pisces()
    batch = nano_loader(data(row_length=512, rows=9), config)(0).with_totals()[0]
    assert batch.samples_BS is not None and batch.positions_BS is not None
    row = next(r for r, ids in enumerate(batch.samples_BS) if len(ids.unique()) > 2)
    own = batch.samples_BS[row].unique_consecutive()[1]
    other = (batch.samples_BS != own) & (batch.samples_BS > 0)
    words = (batch.samples_BS == own) & (batch.ids_BS > 20)
    for place in batch.understanding_at_K, batch.generation_at_K:
        words.view(-1)[place] = False
    changed = replace(batch, ids_BS=torch.where(words, (batch.ids_BS + 1) % 200 + 20, batch.ids_BS))
    with torch.no_grad():
        before, after = (model.hidden(model.embed(b)[0], **model.packing(b)) for b in (batch, changed))
    assert torch.equal(before[other], after[other])  # to the bit
    assert not torch.equal(before[batch.samples_BS == own], after[batch.samples_BS == own])


def test_the_mask_equals_a_walk_over_every_pair_of_places() -> None:
    samples = torch.tensor([[1, 1, 2, 2, 2, 0], [3, 0, 0, 0, 0, 0]])
    mask = block_mask(samples)
    for b in range(2):
        for i in range(6):
            for j in range(6):
                assert bool(mask[b, 0, i, j]) == (j <= i and samples[b, i] == samples[b, j])


def test_flash_attention_gets_positions_and_no_mask() -> None:
    model, config = pisces(), load_config("nano/stage1").model
    batch = nano_loader(data(row_length=512), config)(0).with_totals()[0]
    assert set(model.packing(batch)) == {"position_ids", "attention_mask"} and len(batch.ids_BS) > 1
    assert batch.positions_BS is not None and batch.samples_BS is not None
    model.llm.config._attn_implementation = "flash_attention_2"
    one = replace(batch, samples_BS=batch.samples_BS[:1], positions_BS=batch.positions_BS[:1])
    assert set(model.packing(one)) == {"position_ids"}
    for kind in ("flash_attention_2", "eager"):  # both would let samples see each other without a word
        model.llm.config._attn_implementation = kind
        with pytest.raises(ValueError, match=f"attention '{kind}' with {len(batch.ids_BS)} rows .* use sdpa"):
            model.packing(batch)
    assert model.packing(nano_loader(data(), config)(0).with_totals()[0]) == {}
    assert batch.positions_BS is not None and batch.samples_BS is not None
    starts = (batch.positions_BS == 0) & (batch.samples_BS > 0)
    assert int(starts.sum()) == int(batch.samples_BS.max(1).values.max())


def test_a_blank_micro_batch_weighs_nothing_and_reaches_every_weight() -> None:
    model, config = pisces(), load_config("nano/stage1").model
    for settings_ in ({}, {"row_length": 512}):
        blank = nano_loader(data(**settings_), config).blank()
        losses, grads = gradients(model, [with_blank_pictures(replace(blank, total_text=9, total_vectors=9))])
        assert set(losses) >= {"text", "vectors"} and not any(losses.values())
        learning = {n for n, _ in model.named_parameters() if n.startswith(("llm.", "bridge."))}
        assert learning <= set(grads) and all((g == 0).all() for g in grads.values())


# --------------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("row_length", [0, 512])
def test_processes_hold_the_global_batch_together(row_length: int) -> None:
    config = data(row_length=row_length)
    whole = loader(config)(2)
    for ranks in (2, 3, 4):
        parts = [loader(config, rank=rank, ranks=ranks)(2) for rank in range(ranks)]
        assert sum(part.read for part in parts) == whole.read == 24
        assert _sequences(parts) == _sequences([whole])
        assert sum(part.real_tokens for part in parts) == whole.real_tokens
        pixels = [p for part in parts for p in _pictures(part)]
        assert sorted(pixels) == sorted(_pictures(whole))


def _sequences(steps: list[StepBatches]) -> Counter[tuple[int, ...]]:
    """Every sample's tokens, wherever in whichever row they stand."""
    found: Counter[tuple[int, ...]] = Counter()
    for batch in (batch for step in steps for batch in step.batches):
        for row, ids in enumerate(batch.ids_BS):
            parts = batch.samples_BS[row] if batch.samples_BS is not None else (ids != RENDERER.pad).long()
            for number in parts.unique():
                if number:
                    found[tuple(ids[parts == number].tolist())] += 1
    return found


def _pictures(step: StepBatches) -> list[float]:
    pixels = [b.understanding_pixels_BCHW for b in step.batches] + [b.generation_pixels_BCHW for b in step.batches]
    return [round(float(p.double().sum()), 4) for stack in pixels for p in stack]


def test_steps_come_in_order_from_workers_as_from_the_thread() -> None:
    load = loader(data(row_length=512), batch_size=8)
    by_thread, by_workers = (list(prefetch(load, range(3, 8), workers=workers)) for workers in (0, 2))
    for one, two in zip(by_thread, by_workers, strict=True):
        assert (one.read, one.skipped, one.real_tokens) == (two.read, two.skipped, two.real_tokens)
        for a, b in zip(one.batches, two.batches, strict=True):
            assert torch.equal(a.ids_BS, b.ids_BS) and torch.equal(a.labels_K, b.labels_K)
            assert torch.equal(a.generation_pixels_BCHW, b.generation_pixels_BCHW)


# ---------------------------------------------------------------------------------------------------- damage


def scene(number: int) -> Sample:
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    asked = (Question(f"what is {number}?", f"number {number}"),)
    return Sample(f"s{number}", (image,), f"short {number}", f"a long text about {number}", asked)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    with ShardWriter(tmp_path / "set", 10) as writer:
        for number in range(40):
            writer.write(scene(number))
    return tmp_path / "set"


def spoil(folder: Path, index: int, kind: str) -> None:
    """Flip a byte of a sample, or put a member there that is whole but no picture or text."""
    reader = ShardReader(folder)
    members = reader._members_of(index).tolist()
    offset, size, _, _ = members[0 if kind != "text" else 1]
    path = folder / reader._shards[int(reader._samples[index]["shard"])]["file"]
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = bytes(size) if kind != "checksum" else bytes([content[offset] ^ 1]) * size
    path.write_bytes(content)
    if kind != "checksum":
        index_folder(folder)


@pytest.mark.parametrize("kind", ["checksum", "image", "text"])
def test_a_damaged_sample_leaves_a_hole_and_moves_no_other(written: Path, kind: str) -> None:
    config = DataConfig(sources=[SourceConfig(path=str(written), tasks=TASKS)])
    whole = [loader(config)(step) for step in range(4)]
    spoil(written, 7, kind)
    holed = [loader(config)(step) for step in range(4)]
    skipped = [skip for step in holed for skip in step.skipped]
    assert {(s.key, s.cause, s.source) for s in skipped} == {("s7", kind, str(written))}
    assert len(skipped) in (2, 3) and [step.read for step in holed] == [24] * 4
    lost = _sequences(whole)
    lost.subtract(_sequences(holed))
    assert sum(lost.values()) == len(skipped) and min(lost.values()) >= 0


def test_a_sample_without_the_tasks_text_is_skipped(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set") as writer:
        for number in range(8):
            one = scene(number)
            writer.write(replace(one, detailed="") if number == 3 else one)
            writer.write(Sample(f"t{number}", (), f"only words {number}", "more words"))
    config = DataConfig(sources=[SourceConfig(path=str(tmp_path / "set"), tasks={"generate_detailed": 1.0})])
    step = loader(config, batch_size=16)(0)
    causes = {(s.key, s.cause) for s in step.skipped}
    assert causes == {("s3", "no text"), *((f"t{i}", "no text") for i in range(8))}
    assert "has no text for generate_detailed" in next(s.message for s in step.skipped if s.key == "s3")
    assert "picture 0 is named, it has 0" in next(s.message for s in step.skipped if s.key == "t0")


def test_pairs_are_skipped_alike(written: Path) -> None:
    spoil(written, 7, "image")
    config = DataConfig(sources=[SourceConfig(path=str(written))])
    steps = [PairLoader(Mixture(config, 0), RENDERER.tokenizer, 0, 20, 2, (16, 16))(step) for step in (0, 1)]
    assert [s.key for step in steps for s in step.skipped] == ["s7"]
    keys = Counter(key for step in steps for batch in step.batches for _, key in batch.draws)
    assert keys == Counter(f"s{i}" for i in range(40) if i != 7)
    assert {batch.total for step in steps for batch in step.with_totals()} == {19, 20}
    assert not any(
        batch.total for step in steps for batch in step.batches
    )  # what is not summed over ranks is not there


def test_a_step_of_nothing_but_damage_trains_on_blanks(written: Path) -> None:
    for index in range(40):
        spoil(written, index, "checksum")
    config = DataConfig(sources=[SourceConfig(path=str(written), tasks=TASKS)])
    for row_length in (0, 512):
        step = loader(config.model_copy(update={"row_length": row_length}), batch_size=4)(0)
        assert len(step.skipped) == 4 and all(len(b.labels_K) == 0 for b in step.batches) and step.batches


def test_too_many_damaged_samples_stop_the_run_with_their_names() -> None:
    skips = tuple(Skip("set", f"s{i}", "image", f"set: sample 's{i}' is cut short") for i in range(6))
    tally = SkipTally(0.01)
    for _ in range(10):
        tally.add(StepBatches([], 100, skips[:1]))  # 10 of 1,000
    assert tally.causes == {"image": 10}
    with pytest.raises(TooManyDamaged, match=r"16 of 1,100 .*16 image.*allows 1.00%: set: sample 's0'.*data filter"):
        tally.add(StepBatches([], 100, skips))
    assert [skip.key for skip in tally.first] == ["s0"] * 5
    with pytest.raises(TooManyDamaged, match="1 of 4 samples"):
        SkipTally(0.0).add(StepBatches([], 4, skips[:1]))


# ------------------------------------------------------------------------------------------------ too long


def test_a_sample_that_is_too_long_is_refused_before_the_first_step(written: Path, tmp_path: Path) -> None:
    long = replace(scene(99), key="huge", detailed="word " * 90)
    with ShardWriter(tmp_path / "long") as writer:
        for number in range(5):
            writer.write(scene(number))
        writer.write(long)
    tasks: Any = {"generate_detailed": 1.0}
    config = DataConfig(sources=[SourceConfig(path=str(tmp_path / "long"), tasks=tasks)], max_length=512)
    length = 450
    with pytest.raises(
        LengthError, match=r"sample 'huge' takes (\d+) tokens as generate_detailed, .* is 512"
    ) as caught:
        check_lengths(Mixture(config, 0), RENDERER, config)
    length = int(str(caught.value).split("takes ")[1].split()[0])
    fits = config.model_copy(update={"max_length": length})
    check_lengths(Mixture(fits, 0), RENDERER, fits)
    with pytest.raises(LengthError):
        less = config.model_copy(update={"max_length": length - 1})
        check_lengths(Mixture(less, 0), RENDERER, less)
    short = DataConfig(sources=[SourceConfig(path=str(tmp_path / "long"), tasks={"generate_short": 1.0})])
    check_lengths(Mixture(short, 0), RENDERER, short)


def test_lengths_are_what_rendering_gives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No draw of the fixture is longer than the limit that its check lets pass, and the limit is not far above."""
    monkeypatch.setenv("PISCES_DATA", str(tmp_path))
    for task in ("generate_short", "caption_detailed", "question"):
        source = SourceConfig(path="fixture/train", tasks={task: 1.0})  # type: ignore[dict-item]
        limit = 400
        while True:  # the least limit that passes
            config = DataConfig(sources=[source], max_length=limit, questions_per_image=3)
            try:
                check_lengths(Mixture(config, 0), RENDERER, config)
            except LengthError:
                break
            limit -= 1
        limit += 1
        config = DataConfig(sources=[source], max_length=limit, questions_per_image=3, drop_caption=0.0)
        load = SequenceLoader(Mixture(config, 0), RENDERER, config, 0, 160, 1, (32, 32), multiple=1)
        longest = max(load(step).batches[0].ids_BS.shape[1] for step in range(8))
        assert limit - 12 <= longest <= limit
    assert list((tmp_path / "lengths").glob("*.npy"))


def test_what_has_passed_once_is_not_rendered_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PISCES_DATA", str(tmp_path))
    rendered: list[int] = []
    check = data_lengths._check

    def counting(reader: Any, index: int, *how: Any) -> None:
        rendered.append(index)
        check(reader, index, *how)

    monkeypatch.setattr(data_lengths, "_check", counting)

    def count(limit: int, renderer: Renderer = RENDERER) -> int:
        source = SourceConfig(path="fixture/train", tasks={"question": 1.0})
        config = DataConfig(sources=[source], max_length=limit, questions_per_image=3)
        rendered.clear()
        check_lengths(Mixture(config, 0), renderer, config)
        return len(rendered)

    limit = 400
    with pytest.raises(LengthError):
        while True:  # the least limit that passes
            count(limit)
            limit -= 1
    assert rendered and count(limit + 1) == 0
    assert count(limit + 1, Renderer(RENDERER.tokenizer, "tiny", RENDERER.N - 1, RENDERER.M)) > 0
    for _ in range(2):  # a refusal is no pass, however often it is asked for
        with pytest.raises(LengthError):
            count(limit)


def test_short_samples_are_passed_by_their_bytes_alone(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be too long is not even read: millions of samples are checked from the index."""
    config = DataConfig(sources=[SourceConfig(path=str(written), tasks=TASKS)], max_length=512)
    mixture = Mixture(config, 0)
    monkeypatch.setattr(ShardReader, "words", lambda *_: pytest.fail("a sample was read"))
    check_lengths(mixture, RENDERER, config)
    sizes = ShardReader(written).text_bytes()
    with tarfile.open(written / "00000.tar") as tar:
        assert sizes[:10].tolist() == [tar.getmember(f"s{i}.json").size for i in range(10)] and len(sizes) == 40


def test_the_token_table_counts_each_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISCES_DATA", str(tmp_path))
    turns = ({"role": "user", "content": [{"image": 0}, "see"]}, {"role": "assistant", "content": ["yes!"]})
    with ShardWriter(tmp_path / "set") as writer:
        writer.write(replace(scene(1), conversation=turns))
        writer.write(Sample("none", ()))
    reader = ShardReader(tmp_path / "set")
    table = token_table(reader, RENDERER.tokenizer, np.arange(2))
    expected = [len("short 1"), len("a long text about 1"), len("what is 1?") + len("number 1"), 7, 1, 2, 1]
    assert table.tolist() == [expected, [0] * len(COLUMNS)]
    assert np.array_equal(token_table(reader, RENDERER.tokenizer, np.arange(2)), table)
    assert token_table(reader, RENDERER.tokenizer, np.array([1])).tolist() == [[0] * len(COLUMNS)]
    (tmp_path / "lengths").rename(tmp_path / "gone")
    (tmp_path / "lengths").write_text("a file where the folder should be")
    assert token_table(reader, RENDERER.tokenizer, np.array([0])).tolist() == [expected]  # in memory, then


# ------------------------------------------------------------------------------------------------- settings


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="row_length 100 is less than max_length 512"):
        load_config("nano/stage1", ["data.row_length=100"])
    with pytest.raises(ConfigError, match="weight"):
        load_config("nano/stage1", ["data.sources=[{path: fixture/train, weight: -1.0}]"])
    with pytest.raises(ShardError, match="no dataset at .*unknown"):
        Mixture(DataConfig(sources=[SourceConfig(path="scenes/unknown")]), 0)


def test_foreign_shards_train(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(6):
            buffer = io.BytesIO()
            scene(number).images[0].save(buffer, "JPEG")
            words = json.dumps({"caption": f"words {number}"}).encode()
            for name, content in ((f"{number}.jpg", buffer.getvalue()), (f"{number}.json", words)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    index_folder(tmp_path, {"short": "caption"})
    config = DataConfig(sources=[SourceConfig(path=str(tmp_path), tasks={"generate_short": 1.0})], drop_caption=0.0)
    step = loader(config, batch_size=6)(0)
    text = [RENDERER.tokenizer.decode(ids) for batch in step.batches for ids in batch.ids_BS]
    assert sorted(t[t.index("words ") + 6] for t in text) == list("012345")
