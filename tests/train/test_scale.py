"""What must not grow with the batch, the picture or the number of ranks (audit of paths that never ran at scale)."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from open_pisces.config import RunConfig
from open_pisces.data import lengths
from open_pisces.data.order import Mixture
from open_pisces.data.prompts import LengthError, Renderer
from open_pisces.data.tokenizer import byte_tokenizer
from open_pisces.model.bridge import TargetStatistics, TargetSums
from open_pisces.model.folder import load_part
from open_pisces.model.pisces import Pisces
from open_pisces.recipe import load_config
from open_pisces.train import sharding
from open_pisces.train.flops import take_weights
from open_pisces.train.objectives import build_training, decoder
from open_pisces.train.objectives.pisces import check_lengths_together
from open_pisces.train.sharding import receive_weights
from open_pisces.train.world import World


@pytest.fixture
def decoder_run(runs: Path) -> RunConfig:
    """Nano's decoder on a gen-CLIP whose targets have no statistics yet."""
    start = f"model.start={runs / 'gen_clip' / 'model'}"
    return load_config("nano/decoder", [start, "diffusion.statistics_samples=50", "train.batch_size=8"])


class Ranks(World):
    """One of several ranks, without a process group: sums and messages are its own."""

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather_objects(self, value: Any, group: Any = None) -> list[Any]:
        return [value]


# ------------------------------------------------------------------------------------------- target statistics (S4)


def test_target_statistics_read_few_pictures_at_a_time_and_no_decoder_targets(
    decoder_run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    honest = decoder.DecoderOnVectors.__init__

    def watched(self: Any, encoder: Any, *rest: Any) -> None:
        encoder.register_forward_pre_hook(lambda _, given: encoded.append(len(given[0])))
        honest(self, encoder, *rest)

    def refuse(*_: Any) -> Any:
        raise AssertionError("a whole step was read for the statistics")

    monkeypatch.setattr(decoder.DecoderOnVectors, "__init__", watched)
    monkeypatch.setattr(decoder.PairLoader, "__call__", refuse)
    statistics = build_training(decoder_run).parts["bridge"].statistics
    assert encoded == [decoder.STATISTICS_CHUNK, 50 - decoder.STATISTICS_CHUNK]
    assert statistics.taken == 50


def test_rank_0_alone_encodes_for_target_statistics(decoder_run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "STATISTICS_CHUNK", 8)
    module: Any = build_training(decoder_run).module
    mixture = Mixture(decoder_run.data, decoder_run.seed)
    cpu = torch.device("cpu")
    whole = decoder.target_sums(decoder_run, module, mixture, World(cpu))
    assert whole.pictures == 50

    class Second(Ranks):
        def broadcast(self, tensor: Tensor) -> Tensor:
            assert not tensor.any()  # it has nothing of its own to give
            return tensor

    take_weights(module)
    decoder.target_sums(decoder_run, module, mixture, Second(cpu, 1, 2))


# --------------------------------------------------------------------------------------- weights on rank 0 alone


class First(Ranks):
    """Rank 0 of two; what it broadcasts is kept."""

    sent: list[Any] = []

    def broadcast_object(self, value: Any) -> Any:
        self.sent.append(pickle.dumps(value))  # as a process group does
        return value

    def broadcast(self, tensor: Tensor) -> Tensor:
        self.sent.append(tensor)
        return tensor


class Other(Ranks):
    """Rank 1 of two, that receives what rank 0 sent."""

    def broadcast_object(self, value: Any) -> Any:
        assert value == {}
        return pickle.loads(First.sent.pop(0))

    def broadcast(self, tensor: Tensor) -> Tensor:
        arrived = First.sent.pop(0)
        assert (tensor.shape, tensor.dtype) == (arrived.shape, arrived.dtype)
        return tensor.copy_(arrived)


@pytest.mark.parametrize("name", ["gen_clip", "decoder", "stage3"])
def test_other_ranks_get_structure_first_and_weights_block_by_block(runs: Path, name: str) -> None:
    before = {"gen_clip": "understanding_clip", "decoder": "gen_clip", "stage3": "stage2"}[name]
    config = load_config(f"nano/{name}", [f"model.start={runs / before / 'model'}"])
    expected = build_training(config).module.state_dict()
    cpu = torch.device("cpu")
    First.sent = []
    first = build_training(config, First(cpu, 0, 2))
    structure = First.sent[0]
    other = build_training(config, Other(cpu, 1, 2))
    assert len(structure) < 2_000_000
    for objective in (first, other):
        assert all(p.is_meta for p in objective.module.parameters())
    assert other.weights == {} and len(first.weights) == len(list(first.module.parameters()))
    First.sent = []
    receive_weights(sharding._owners(first.module), first.weights, First(cpu, 0, 2), first.module)
    assert first.weights == {}  # let go of as they are sent
    receive_weights(sharding._owners(other.module), {}, Other(cpu, 1, 2), other.module)
    for objective in (first, other):
        found = objective.module.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_rank_0_holds_half_precision_files_as_they_are_and_sends_float32(runs: Path, tmp_path: Path) -> None:
    half = tmp_path / "model"
    shutil.copytree(runs / "stage2" / "model", half)
    for file in half.rglob("*.safetensors"):
        weights = load_file(file)
        learned = {name: value.bfloat16() for name, value in weights.items() if not name.startswith("statistics")}
        save_file({**weights, **learned}, file, {"format": "pt"})
    config = load_config("nano/stage3", [f"model.start={half}"])
    expected = build_training(config).module.state_dict()
    cpu = torch.device("cpu")
    First.sent = []
    first = build_training(config, First(cpu, 0, 2))
    assert {value.dtype for value in first.weights.values()} == {torch.bfloat16}
    assert all(p.is_meta and p.dtype == torch.float32 for p in first.module.parameters())
    receive_weights(sharding._owners(first.module), first.weights, First(cpu, 0, 2), first.module)
    found = first.module.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_part_of_mixed_dtypes_is_read_in_float32(nano_folder: Path, tmp_path: Path) -> None:
    """Half precision only where nothing is rounded by it: one float32 norm among bfloat16 weights keeps its bits."""
    folder = tmp_path / "model"
    shutil.copytree(nano_folder, folder)
    file = folder / "llm" / "model.safetensors"
    weights = load_file(file)
    norm = next(name for name in weights if "norm" in name)
    halves = {name: value.bfloat16() for name, value in weights.items()}
    save_file(halves, file, {"format": "pt"})
    assert {p.dtype for p in load_part(folder, "llm", dtype=None).parameters()} == {torch.bfloat16}
    save_file({**halves, norm: weights[norm] + 1e-6}, file, {"format": "pt"})
    read = load_part(folder, "llm", dtype=None)
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    assert torch.equal(read.state_dict()[norm], weights[norm] + 1e-6)


def test_weights_that_are_shared_stay_shared_when_they_are_taken(nano_pisces: Pisces) -> None:
    pisces = copy.deepcopy(nano_pisces)
    llm = pisces.llm
    assert llm.get_input_embeddings().weight is llm.get_output_embeddings().weight
    weights = take_weights(pisces)
    assert llm.get_input_embeddings().weight is llm.get_output_embeddings().weight and all(
        p.is_meta for p in pisces.parameters()
    )
    receive_weights(sharding._owners(pisces), weights, World(torch.device("cpu")), pisces)
    assert llm.get_input_embeddings().weight is llm.get_output_embeddings().weight
    for name, value in nano_pisces.state_dict().items():
        assert torch.equal(pisces.state_dict()[name], value), name


def test_statistics_from_sums_equal_those_of_all_pictures_at_once() -> None:
    raw = torch.randn(40, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5 + 100
    statistics = TargetStatistics(4, 3)
    parts = [TargetSums.of(part) for part in raw.split(7)]
    statistics.take(sum(parts[1:], parts[0]), True)
    torch.testing.assert_close(statistics.mean_E.double(), raw.mean((0, 1)))
    torch.testing.assert_close(statistics.std_E.double(), raw.std((0, 1)))


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 vectors, found 0"):
        TargetStatistics(4, 3).take(TargetSums.of(torch.zeros(0, 4, 3)), True)


# ------------------------------------------------------------------------------------------------ lengths (S5)


@pytest.fixture
def conversations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Mixture, Renderer, Any]]:
    """A mixture whose every sample has to be tokenized, ten to a share, with an empty cache of its own."""
    monkeypatch.setattr(lengths, "SHARED", 10)
    monkeypatch.setattr(lengths, "data_path", lambda name: tmp_path / name)
    monkeypatch.setattr(lengths, "_byte_bound", lambda reader, renderer: np.full(len(reader), 10**6))
    data = load_config("nano/stage1").data
    yield Mixture(data, 0), Renderer(byte_tokenizer("tiny"), "tiny", 16, 4), data


def test_ranks_share_the_tokenizing_and_its_cache_serves_any_number(
    conversations: tuple[Mixture, Renderer, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture, renderer, data = conversations
    read: list[int] = []
    honest = lengths._words
    monkeypatch.setattr(lengths, "_words", lambda reader, i: read.append(i) or honest(reader, i))  # type: ignore[func-returns-value]
    for rank in range(3):
        before = len(read)
        lengths.check_lengths(mixture, renderer, data, rank, 3)
        assert len(read) - before < 0.5 * len(mixture.readers[0])
    assert sorted(read) == list(range(len(mixture.readers[0])))
    lengths.check_lengths(mixture, renderer, data)
    assert len(read) == len(mixture.readers[0])


def test_a_sample_too_long_is_found_by_one_rank_and_refused_by_all(
    conversations: tuple[Mixture, Renderer, Any],
) -> None:
    mixture, renderer, data = conversations
    short = data.model_copy(update={"max_length": 40})
    for rank in range(2):
        with pytest.raises(LengthError, match="data.max_length is 40"):
            lengths.check_lengths(mixture, renderer, short, rank, 2)

    class Other(Ranks):
        def gather_objects(self, value: Any, group: Any = None) -> list[Any]:
            return [value, "images: sample 'a' takes 99 tokens"]

    config = load_config("nano/stage1")
    with pytest.raises(LengthError, match="sample 'a' takes 99"):
        check_lengths_together(mixture, renderer, replace_data(config, data), Other(torch.device("cpu"), 0, 2))


def replace_data(config: RunConfig, data: Any) -> RunConfig:
    return config.model_copy(update={"data": data})


# -------------------------------------------------------------------------------------- pixels and workers (S6, S10)


@pytest.mark.parametrize("name", ["gen_clip", "decoder", "stage3"])
def test_a_step_carries_bytes_and_not_floats(runs: Path, name: str) -> None:
    before = {"gen_clip": "understanding_clip", "decoder": "gen_clip", "stage3": "stage2"}[name]
    training = build_training(load_config(f"nano/{name}", [f"model.start={runs / before / 'model'}"]))
    batches = [*training.load(0).with_totals(), training.load.blank()]
    for batch in batches:
        for field in ("pixels_BCHW", "targets_BCHW", "understanding_pixels_BCHW", "generation_pixels_BCHW"):
            assert getattr(batch, field, torch.zeros(1, dtype=torch.uint8)).dtype == torch.uint8
    floats = batches[0].to("cpu", torch.float64)
    fields = [field for field in ("pixels_BCHW", "generation_pixels_BCHW") if hasattr(floats, field)]
    assert all(getattr(floats, field).dtype == torch.float64 for field in fields)
    assert training.losses(batches[0]).loss.isfinite()


def test_floats_and_bytes_of_the_same_pictures_have_the_same_loss(runs: Path) -> None:
    training = build_training(load_config("nano/gen_clip", [f"model.start={runs / 'understanding_clip' / 'model'}"]))
    (batch,) = training.load(0).with_totals()
    as_floats = replace(batch, pixels_BCHW=batch.pixels_BCHW.float() / 255)
    assert torch.equal(training.losses(batch).loss, training.losses(as_floats).loss)


@pytest.mark.parametrize("name", ["gen_clip", "decoder", "stage1", "stage2", "stage3"])
def test_the_papers_scale_reads_with_several_workers(name: str) -> None:
    assert load_config(f"8b/{name}").data.workers >= 4
