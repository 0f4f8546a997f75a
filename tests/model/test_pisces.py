"""The multimodal LLM: what it reads, what predicts what, and how its two losses are counted."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import build_pisces
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM
from transformers.initialization import no_init_weights

from open_pisces.batch import SequenceBatch, Turn
from open_pisces.config import LossConfig
from open_pisces.data.prompts import Renderer, collate
from open_pisces.model.bridge import TargetSums
from open_pisces.model.folder import without_sources
from open_pisces.model.pisces import Pisces, with_blank_pictures
from open_pisces.recipe import load_config

SAY = (Turn("user", ("How are you?",)), Turn("assistant", ("Fine, thank you.",)))
SEE = (Turn("user", (0, "What is it?")), Turn("assistant", ("A cat.",)))
DRAW = (Turn("user", ("Draw: a red ball",)), Turn("assistant", (0,)))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def renderer(nano_pisces: Pisces, nano_tokenizer: Any) -> Renderer:
    return Renderer(nano_tokenizer, "tiny", nano_pisces.understanding_encoder.vectors, 4)


def counted(batch: SequenceBatch) -> SequenceBatch:
    return replace(batch, total_text=len(batch.labels_K), total_vectors=len(batch.generation_at_K))


def batch_of(renderer: Renderer, *samples: tuple[Turn, ...]) -> SequenceBatch:
    images = [(picture(i),) for i in range(len(samples))]
    return counted(collate([renderer.render(turns) for turns in samples], images, renderer, 32, 32))


@pytest.fixture
def model(nano_pisces: Pisces) -> Pisces:
    """A copy with visible weights (random starts are small) that a test may change."""
    changed = copy.deepcopy(nano_pisces)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*changed.llm.parameters(), *changed.bridge.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return changed


# ---------------------------------------------------------------------------------------------------- text alone


@torch.no_grad()
def test_text_only_logits_and_loss_equal_llamas_own(model: Pisces, renderer: Renderer, tmp_path: Path) -> None:
    model.llm.save_pretrained(tmp_path)
    llama = LlamaForCausalLM.from_pretrained(tmp_path)
    rendered = renderer.render(SAY)
    theirs = llama(input_ids=torch.tensor([rendered.ids]), labels=torch.tensor([rendered.labels]))
    batch = batch_of(renderer, SAY)
    logits = model.llm.get_output_embeddings()(model.hidden(model.embed(batch)[0]))[:, : len(rendered.ids)]
    torch.testing.assert_close(logits, theirs.logits, rtol=1e-5, atol=1e-5)
    losses = model(batch)
    torch.testing.assert_close(losses.parts["text"], theirs.loss, rtol=1e-5, atol=1e-5)
    assert losses.parts["vectors"] == 0


# ---------------------------------------------------------------------------------------------------- causality


@torch.no_grad()
def test_a_later_vector_cannot_change_an_earlier_prediction(model: Pisces, renderer: Renderer) -> None:
    batch = batch_of(renderer, DRAW)
    places = batch.generation_at_K.tolist()
    vectors = model.generation_vectors(batch.generation_pixels_BCHW)

    def states(vectors_BME: Tensor) -> Tensor:
        return model.hidden(model.embed(replace(batch, generation_vectors_BME=vectors_BME))[0])[0]

    before = states(vectors)
    for k in range(4):
        changed = vectors.clone()
        changed[:, k] += 10.0
        after = states(changed)
        assert torch.equal(after[: places[k]], before[: places[k]]), k
        moved = (after[places[k] :] - before[places[k] :]).abs().amax(-1)
        assert (moved > 1e-4).all(), k  # itself and everything behind it


@torch.no_grad()
def test_a_later_word_cannot_change_an_earlier_prediction(model: Pisces, renderer: Renderer) -> None:
    batch = batch_of(renderer, SEE)
    before = model.hidden(model.embed(batch)[0])[0]
    at = int(batch.text_at_K[2])
    ids = batch.ids_BS.clone()
    ids[0, at] = (ids[0, at] + 1) % 200
    after = model.hidden(model.embed(replace(batch, ids_BS=ids))[0])[0]
    assert torch.equal(after[:at], before[:at])
    assert (after[at] - before[at]).abs().max() > 1e-4


@torch.no_grad()
def test_a_row_sees_neither_its_neighbours_nor_its_padding(model: Pisces, renderer: Renderer) -> None:
    rows = (SAY, SEE, DRAW)
    together = batch_of(renderer, *rows)
    hidden = model.hidden(model.embed(together)[0])
    for i, turns in enumerate(rows):
        rendered = renderer.render(turns)
        alone = counted(collate([rendered], [(picture(i),)], renderer, 32, 32, multiple=1))
        expected = model.hidden(model.embed(alone)[0])[0]
        torch.testing.assert_close(hidden[i, : len(rendered.ids)], expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- alignment


def test_the_state_at_img_predicts_vector_1_at_vector_k_the_next_and_at_the_last_the_end(
    model: Pisces, renderer: Renderer
) -> None:
    batch = batch_of(renderer, DRAW)
    begin = batch.ids_BS[0].tolist().index(renderer.begin_image)
    assert batch.ids_BS[0, begin : begin + 6].tolist() == [
        renderer.begin_image,
        *[renderer.placeholder] * 4,
        renderer.end_image,
    ]
    targets = model.generation_vectors(batch.generation_pixels_BCHW)[0]
    with torch.no_grad():
        hidden = model.hidden(model.embed(batch)[0])[0]
        error = sum(
            (model.bridge.head(hidden[begin + k]) - targets[k]).pow(2).mean()  # begin is [IMG], begin + k vector k
            for k in range(4)
        )
        supervised = {begin: renderer.begin_image, begin + 5: renderer.end_image, begin + 6: renderer.end_of_turn}
        logits = model.llm.get_output_embeddings()(hidden)
        text = sum(-logits[place - 1].log_softmax(-1)[token] for place, token in supervised.items())
        losses = model(batch)
    torch.testing.assert_close(losses.parts["vectors"], torch.as_tensor(error) / 4, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.parts["text"], torch.as_tensor(text) / 3, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_drawing_reads_from_the_same_places_as_training(model: Pisces, renderer: Renderer) -> None:
    batch = batch_of(renderer, DRAW)
    inputs, targets = model.embed(batch)
    begin = int(batch.generation_at_K[0]) - 1
    hidden = model.hidden(inputs)[0]
    for k in range(4):
        vector, embedded = model.next_vector(hidden[begin + k : begin + k + 1])
        torch.testing.assert_close(vector[0], model.bridge.head(hidden[begin + k]))
        torch.testing.assert_close(embedded, model.bridge.generation_projector(vector))
        # What training feeds at vector k + 1 is the projection of the true vector k + 1.
        fed = model.bridge.generation_projector(targets[0, k])
        torch.testing.assert_close(inputs[0, begin + 1 + k], fed, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_targets_are_the_pooled_standardised_features_of_the_generation_encoder(
    model: Pisces, renderer: Renderer
) -> None:
    batch = batch_of(renderer, DRAW)
    raw = model.bridge.pooler(model.generation_encoder(batch.generation_pixels_BCHW)[:, 1:])  # class token dropped
    apart = raw.repeat(2, 1, 1) * torch.tensor([1.0, 3.0]).view(2, 1, 1) + 1
    model.bridge.statistics.take(TargetSums.of(apart), True)
    expected = (raw - model.bridge.statistics.mean_E) / model.bridge.statistics.std_E
    torch.testing.assert_close(model.embed(batch)[1], expected)
    assert not torch.allclose(expected, raw, atol=0.1)


# ------------------------------------------------------------------------------------------------------- losses


def grads(model: Pisces) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_micro_batches_with_global_counts_add_up_to_the_whole_batch(model: Pisces, renderer: Renderer) -> None:
    long = (Turn("user", (0, "And what is this?")), Turn("assistant", ("Two dogs, a cat and a very long train.",)))
    whole = batch_of(renderer, SAY, DRAW, SEE, DRAW, long)
    images = [(picture(i),) for i in range(5)]
    rendered = [renderer.render(turns) for turns in (SAY, DRAW, SEE, DRAW, long)]
    totals = {"total_text": whole.total_text, "total_vectors": whole.total_vectors}
    # Cut so unevenly that a mean of means would be far off; the first part has no picture at all.
    cuts = ([0], [1], [2, 3, 4])
    parts = [
        replace(collate([rendered[i] for i in c], [images[i] for i in c], renderer, 32, 32), **totals) for c in cuts
    ]
    expected = model(whole)
    expected.loss.backward()
    wanted = grads(model)
    model.zero_grad(set_to_none=True)
    found = [model(part) for part in parts]
    for losses in found:
        losses.loss.backward()
    for name in ("text", "vectors"):
        total = torch.stack([losses.parts[name] for losses in found]).sum()
        torch.testing.assert_close(total, expected.parts[name], rtol=1e-5, atol=0)
    for name, value in grads(model).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=2e-6, msg=name)


def test_loss_weights_weigh_the_two_terms(model: Pisces, renderer: Renderer) -> None:
    batch = batch_of(renderer, SEE, DRAW)
    model.weights = LossConfig(text=0.25, vectors=3.0)
    losses = model(batch)
    torch.testing.assert_close(losses.loss, 0.25 * losses.parts["text"] + 3.0 * losses.parts["vectors"])


@pytest.mark.parametrize(("task", "idle"), [(SEE, "generation_projector"), (DRAW, "understanding_projector")])
def test_a_batch_of_one_task_touches_every_module_with_zero_gradients(
    model: Pisces, renderer: Renderer, task: tuple[Turn, ...], idle: str
) -> None:
    # A sharded rank that leaves a module out hangs the others.
    model(with_blank_pictures(batch_of(renderer, task, task))).loss.backward()
    for name, parameter in model.bridge.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith(idle):
            assert not parameter.grad.any(), name
    assert all(p.grad is not None for p in model.llm.parameters())


def test_a_batch_without_pictures_touches_every_module_too(model: Pisces, renderer: Renderer) -> None:
    losses = model(with_blank_pictures(batch_of(renderer, SAY)))
    losses.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.bridge.parameters())
    assert losses.parts["vectors"] == 0 and losses.parts["text"] > 0


@pytest.mark.parametrize("task", [SEE, DRAW, SAY], ids=["see", "draw", "say"])
def test_blank_pictures_change_no_loss_and_no_gradient(
    model: Pisces, renderer: Renderer, task: tuple[Turn, ...]
) -> None:
    batch = batch_of(renderer, task)
    found = []
    for given in (batch, with_blank_pictures(batch)):
        model.zero_grad()
        losses = model(given)
        losses.loss.backward()
        found.append([losses.loss.detach()] + [p.grad for p in model.llm.parameters()])
    for one, other in zip(*found, strict=True):
        assert one is not None and torch.equal(one, other)


@pytest.mark.parametrize(
    ("task", "seen", "drawn"), [(SAY, 0, 0), (SEE, 1, 0), (DRAW, 0, 1)], ids=["say", "see", "draw"]
)
def test_an_encoder_runs_only_for_pictures(
    model: Pisces, renderer: Renderer, task: tuple[Turn, ...], seen: int, drawn: int
) -> None:
    calls = []
    for name in ("understanding_encoder", "generation_encoder"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    model(batch_of(renderer, task))
    assert calls == ["understanding_encoder"] * seen + ["generation_encoder"] * drawn


@torch.no_grad()
def test_the_other_task_in_a_batch_changes_nothing_in_a_loss(model: Pisces, renderer: Renderer) -> None:
    alone, mixed = batch_of(renderer, DRAW), batch_of(renderer, DRAW, SEE)
    torch.testing.assert_close(model(mixed).parts["vectors"], model(alone).parts["vectors"], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_vectors_given_equal_vectors_encoded(model: Pisces, renderer: Renderer) -> None:
    batch = batch_of(renderer, DRAW, SEE)
    given = replace(batch, generation_vectors_BME=model.generation_vectors(batch.generation_pixels_BCHW))
    assert torch.equal(model(given).loss, model(batch).loss)
    none = replace(batch, generation_vectors_BME=given.generation_vectors_BME * 0)  # type: ignore[operator]
    assert not torch.equal(model(none).loss, model(batch).loss)


def test_frozen_encoders_get_no_gradient(model: Pisces, renderer: Renderer) -> None:
    model.understanding_encoder.requires_grad_(False)
    model.generation_encoder.requires_grad_(False)
    model(batch_of(renderer, SEE, DRAW)).loss.backward()
    assert all(p.grad is None for p in model.understanding_encoder.parameters())
    assert all(p.grad is None for p in model.generation_encoder.parameters())
    assert model.bridge.understanding_projector.first.weight.grad.abs().sum() > 0


def test_an_understanding_encoder_that_is_not_frozen_learns(model: Pisces, renderer: Renderer) -> None:
    model(batch_of(renderer, SEE)).loss.backward()
    tower = model.understanding_encoder.tower
    assert tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------- 8b


@pytest.fixture(scope="module")
def full_size() -> tuple[Pisces, FakeTensorMode]:
    """The paper's model with fake weights: shapes are real, memory is not."""
    config = without_sources(load_config("8b/stage1").model)
    mode = FakeTensorMode()
    with mode, no_init_weights():  # drawing SigLIP's start asks for values, which fake tensors do not have
        return build_pisces(config, 128256 + 3), mode


@pytest.mark.parametrize("task", ["understanding", "generation"])
def test_one_forward_of_each_task_runs_at_8b_with_fake_tensors(
    full_size: tuple[Pisces, FakeTensorMode], task: str
) -> None:
    model, mode = full_size
    N, M = (729, 0) if task == "understanding" else (0, 64)
    assert N in (0, model.understanding_encoder.vectors) and M in (0, model.settings.generation.vectors)
    with mode:
        batch = SequenceBatch(
            ids_BS=torch.zeros(1, 896, dtype=torch.long),
            understanding_at_K=torch.arange(20, 20 + N),
            generation_at_K=torch.arange(60, 60 + M),
            text_at_K=torch.arange(800, 832),
            labels_K=torch.zeros(32, dtype=torch.long),
            understanding_pixels_BCHW=torch.zeros(N // 729, 3, 384, 384),
            generation_pixels_BCHW=torch.zeros(M // 64, 3, 448, 448),
            total_text=32,
            total_vectors=M,
        )
        inputs, targets = model.embed(batch)
        losses = model(batch)
    assert inputs.shape == (1, 896, 4096) and targets.shape == (M // 64, 64, 1280)
    assert losses.loss.shape == losses.parts["text"].shape == losses.parts["vectors"].shape == ()
    assert losses.loss.requires_grad


def test_one_forward_of_the_decoder_runs_at_8b_with_fake_tensors(full_size: tuple[Pisces, FakeTensorMode]) -> None:
    model, mode = full_size
    decoder = model.decoder
    assert decoder is not None and decoder.latent_shape == (4, 128, 128)
    with mode:
        latents = torch.zeros(1, 4, 128, 128)
        assert decoder(latents, torch.zeros(1, 64, 1280), latents, torch.full((1,), 0.5)).shape == (1,)
