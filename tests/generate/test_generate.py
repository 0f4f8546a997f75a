"""The generator: a cache, padding and neighbours that change nothing, and prompts that are refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image, fromarray
from torch import Tensor

from open_pisces.batch import Turn
from open_pisces.config import LossConfig
from open_pisces.data.prompts import collate, generation_turns, repeated
from open_pisces.device import pick_device
from open_pisces.generate.generator import Generator, PromptError
from open_pisces.model.pisces import Pisces
from open_pisces.settings import ConfigError

PROMPTS = ["a red ball", "two small blue cats left of one very big green tree", "é"]


def picture(seed: int) -> Image:
    return fromarray(np.random.default_rng(seed).integers(0, 256, (40, 32, 3), dtype=np.uint8))


def lively(pisces: Pisces) -> Pisces:
    """A copy with large weights: answers then depend on every token, and the same one does not come for ever."""
    changed = copy.deepcopy(pisces)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in (*changed.llm.parameters(), *changed.bridge.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return changed


@pytest.fixture(scope="module")
def generator(nano_pisces: Pisces, nano_tokenizer: Any) -> Generator:
    return Generator(lively(nano_pisces), nano_tokenizer, "cpu")


@pytest.fixture(scope="module")
def exact(nano_pisces: Pisces, nano_tokenizer: Any) -> Generator:
    """In float64: feeding vectors back amplifies rounding, which would hide whether the steps are the same."""
    return Generator(lively(nano_pisces).double(), nano_tokenizer, "cpu")


def near(one: Image, other: Image) -> bool:
    """Equal but for one level of rounding."""
    return bool(np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1)


def differ(one: Image, other: Image) -> bool:
    return bool(np.abs(np.asarray(one, int) - np.asarray(other, int)).max() > 1)


# ------------------------------------------------------------------------------------------------------- the cache


@torch.inference_mode()
def state_after(generator: Generator, turns: tuple[Turn, ...], ids: list[int], vectors: Tensor | None) -> Tensor:
    """The last hidden state of a sequence read as a whole, without a cache, padding or mask."""
    rendered = generator.renderer.render(turns, answer_next=True)
    rendered.add(ids)
    if vectors is not None:
        rendered.add([generator.renderer.begin_image])
        rendered.add([generator.renderer.placeholder] * vectors.shape[1], place="generation")
    batch = collate([rendered], [(picture(0),)], generator.renderer, *generator.sizes, multiple=1)
    batch = replace(
        batch,
        generation_vectors_BME=vectors if vectors is not None and vectors.shape[1] else None,
    )
    return generator.pisces.hidden(generator.pisces.embed(batch)[0])[0, -1]


@torch.inference_mode()
def test_cached_text_equals_reading_the_whole_sequence_at_every_step(exact: Generator) -> None:
    turns = (Turn("user", (0, "What is in this picture?")),)
    answers = exact._tokens([turns], [(picture(0),)], 24, 0.0, 0, None)
    found = [token for (token,) in answers]
    ids: list[int] = []
    for _ in range(24):
        logits = exact.pisces.llm.get_output_embeddings()(state_after(exact, turns, ids, None))
        order = logits.argsort(descending=True).tolist()
        allowed = set(range(256)) | {exact.renderer.end_of_turn}
        ids.append(next(token for token in order if token in allowed))
    assert found == ids
    assert len(set(found)) > 2  # a stuck model would make this an easy test


@torch.inference_mode()
def test_cached_vectors_equal_reading_the_whole_sequence_at_every_step(exact: Generator) -> None:
    written = exact.vectors([PROMPTS[1]])
    turns = generation_turns(PROMPTS[1])
    so_far = torch.zeros(1, 0, 32, dtype=torch.float64)
    for _ in range(4):
        vector = exact.pisces.bridge.head(state_after(exact, turns, [], so_far))
        so_far = torch.cat([so_far, vector.view(1, 1, -1)], 1)
    assert written.shape == (1, 4, 32)
    torch.testing.assert_close(written, so_far.float(), rtol=1e-6, atol=1e-6)
    assert (so_far[0, 1:] - so_far[0, :-1]).abs().amax(-1).min() > 1e-3  # the four differ


@torch.inference_mode()
@pytest.mark.parametrize("scale", [0.0, 1.3])
def test_vector_guidance_turns_the_hidden_state_away_from_the_empty_captions(exact: Generator, scale: float) -> None:
    written = exact.vectors([PROMPTS[1]], vector_guidance=scale)
    so_far = torch.zeros(1, 0, 32, dtype=torch.float64)
    for _ in range(4):
        hidden = state_after(exact, generation_turns(PROMPTS[1]), [], so_far)
        empty = state_after(exact, generation_turns(""), [], so_far)  # before the same vectors
        vector = exact.pisces.bridge.head(empty + scale * (hidden - empty))
        so_far = torch.cat([so_far, vector.view(1, 1, -1)], 1)
    torch.testing.assert_close(written, so_far.float(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(written, exact.vectors([PROMPTS[1]]), atol=1e-3)
    if scale == 0:
        torch.testing.assert_close(written[0], exact.null_vectors)


def test_vector_guidance_below_0_is_refused(generator: Generator) -> None:
    with pytest.raises(PromptError, match="vector_guidance -1.0: give 1"):
        generator.image(PROMPTS[:1], vector_guidance=-1.0)


def test_vector_guidance_is_the_models_own_unless_it_is_said(generator: Generator, monkeypatch: Any) -> None:
    plain = generator.vectors(PROMPTS)
    assert torch.equal(generator.vectors(PROMPTS, vector_guidance=1.0), plain)
    guided = generator.vectors(PROMPTS, vector_guidance=1.5)
    settings = generator.pisces.settings
    bridge = settings.bridge.model_copy(update={"vector_guidance": 1.5})
    monkeypatch.setattr(generator.pisces, "settings", settings.model_copy(update={"bridge": bridge}))
    assert torch.equal(generator.vectors(PROMPTS), guided) and not torch.equal(guided, plain)
    (drawn,), (told,) = generator.image(PROMPTS[:1], seed=3), generator.image(PROMPTS[:1], seed=3, vector_guidance=1.0)
    assert differ(drawn[0], told[0])
    alone = torch.cat([generator.vectors([prompt]) for prompt in PROMPTS])  # neighbors change nothing with it either
    torch.testing.assert_close(guided, alone, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- padding, neighbours


def test_a_left_padded_batch_answers_as_one_by_one(exact: Generator) -> None:
    images = [[picture(0)], [], [picture(1), picture(2)]]
    together = exact.text(images, PROMPTS, max_new_tokens=16)
    alone = [exact.text([i], [p], max_new_tokens=16)[0] for i, p in zip(images, PROMPTS, strict=True)]
    assert together == alone and len(set(together)) == 3


def test_a_left_padded_batch_draws_as_one_by_one(generator: Generator) -> None:
    together = generator.vectors(PROMPTS)
    alone = torch.cat([generator.vectors([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3
    drawn = generator.image(PROMPTS, steps=2)
    for prompt, (image,) in zip(PROMPTS, drawn, strict=True):
        assert near(generator.image([prompt], steps=2)[0][0], image), prompt
    assert differ(drawn[0][0], drawn[1][0])


def test_the_same_seed_draws_the_same_picture_and_another_seed_another(generator: Generator) -> None:
    first, again = (generator.image(PROMPTS[:1], steps=2, seed=3)[0][0] for _ in range(2))
    assert first.tobytes() == again.tobytes() and first.size == (32, 32)
    assert differ(generator.image(PROMPTS[:1], steps=2, seed=4)[0][0], first)


def test_picture_j_depends_neither_on_n_nor_on_the_other_prompts(generator: Generator) -> None:
    three = generator.image(PROMPTS[:1], n=3, steps=2)[0]
    two = generator.image(PROMPTS[:2], n=2, steps=2)
    assert len(three) == 3 and [len(row) for row in two] == [2, 2]
    assert near(three[0], two[0][0]) and near(three[1], two[0][1])
    assert differ(three[0], three[1]) and differ(three[1], three[2])


def test_a_drawing_tells_of_every_vector_and_every_step_in_their_order(generator: Generator) -> None:
    told: list[tuple[str, int, int]] = []
    generator.image(PROMPTS[:2], steps=3, guidance_scale=1.0, progress=lambda *now: told.append(now))
    M = generator.renderer.M
    vectors = [("vectors", k + 1, M) for k in range(M)]
    assert told == [*vectors, ("steps", 1, 3), ("steps", 2, 3), ("steps", 3, 3)]


@pytest.mark.parametrize("stage", ["vectors", "steps"])
def test_what_progress_raises_ends_a_drawing_at_once_and_leaves_the_model_usable(
    generator: Generator, stage: str
) -> None:
    class Stop(Exception):
        pass

    told: list[tuple[str, int]] = []

    def stop(now: str, done: int, of: int) -> None:
        told.append((now, done))
        if (now, done) == (stage, 2):
            raise Stop

    before = generator.image(PROMPTS[:1], steps=3)[0][0]
    with pytest.raises(Stop):
        generator.image(PROMPTS[:1], steps=3, progress=stop)
    assert told[-1] == (stage, 2)
    assert generator.image(PROMPTS[:1], steps=3)[0][0].tobytes() == before.tobytes()


def test_sampled_answers_are_repeatable_and_do_not_depend_on_neighbours(exact: Generator) -> None:
    alone = exact.text([[]], [PROMPTS[0]], 16, temperature=1.0, seed=5)[0]
    batch = exact.text([[], []], [PROMPTS[1], PROMPTS[0]], 16, temperature=1.0, seed=5)
    assert batch[1] == alone
    assert exact.text([[]], [PROMPTS[0]], 16, temperature=1.0, seed=6)[0] != alone


# -------------------------------------------------------------------------------------------------------- guidance


def test_guidance_1_skips_the_null_pass_and_others_run_it_once(
    nano_pisces: Pisces, nano_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(nano_pisces, nano_tokenizer, "cpu")
    read: list[Any] = []
    original = Generator.prompt
    monkeypatch.setattr(
        Generator, "prompt", lambda self, turns, *rest: read.append(turns) or original(self, turns, *rest)
    )
    generator.image(["x"], steps=1, guidance_scale=1.0)
    assert read == [[generation_turns("x")]]
    generator.image(["x"], steps=1, guidance_scale=2.0)
    generator.image(["x"], steps=1, guidance_scale=2.0)
    assert read[1:] == [[generation_turns("x")], [generation_turns("")], [generation_turns("x")]]


def test_guidance_and_steps_come_from_the_model_when_none_are_asked_for(generator: Generator) -> None:
    settings = generator.pisces.settings.decoder
    default = generator.image(PROMPTS[:1])[0][0]
    asked = generator.image(PROMPTS[:1], steps=settings.steps, guidance_scale=settings.guidance_scale)[0][0]
    assert default.tobytes() == asked.tobytes()
    assert differ(generator.image(PROMPTS[:1], guidance_scale=settings.guidance_scale + 4)[0][0], default)


def test_the_null_context_is_the_empty_captions_vectors(generator: Generator) -> None:
    torch.testing.assert_close(generator.null_vectors, generator.vectors([""])[0])
    given: list[Tensor] = []
    original = generator.pisces.decoder.sample  # type: ignore[union-attr]
    generator.pisces.decoder.sample = lambda *a: given.append(a[1]) or original(*a)  # type: ignore
    try:
        generator.image(PROMPTS[:1], steps=1, guidance_scale=2.0)
    finally:
        del generator.pisces.decoder.sample  # type: ignore[union-attr]
    expected = generator.pisces.bridge.statistics.destandardize(generator.null_vectors)
    torch.testing.assert_close(given[0], expected)


def test_the_null_distance_counts_deviations_between_the_two_null_conditions(generator: Generator) -> None:
    statistics = generator.pisces.bridge.statistics
    before = statistics.null_ME.clone()
    try:
        statistics.null_ME.copy_(generator.null_vectors)
        assert generator.null_distance() < 1e-5
        statistics.null_ME.add_(2.0)  # standardised space: two deviations everywhere
        assert abs(generator.null_distance() - 2.0) < 1e-4
    finally:
        statistics.null_ME.copy_(before)


def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ConfigError, match="device 'cuda:0' is not available"):
        pick_device("cuda:0")


def test_a_reconstruction_draws_the_true_vectors(generator: Generator) -> None:
    images = [picture(0), picture(1)]
    vectors = generator.pisces.bridge.statistics.destandardize(generator.encode(images))
    noise = torch.randn(48, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    with torch.inference_mode():
        expected = generator.pisces.decoder.sample(vectors, None, noise, 3, 1.0)  # type: ignore[union-attr]
    drawn = generator.reconstruct(images, steps=3, guidance_scale=1.0)
    for image, pixels in zip(drawn, expected, strict=True):
        assert np.abs(np.asarray(image) / 255 - pixels.permute(1, 2, 0).numpy()).max() < 0.003


# ------------------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_joined_equals_the_text(generator: Generator, prompt: str, length: int) -> None:
    pieces = list(generator.text_stream([picture(0)], prompt, length))
    assert "".join(pieces) == generator.text([[picture(0)]], [prompt], length)[0]


def test_a_stream_tells_whole_characters_and_stops_at_the_end_of_turn(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = [
        *generator.renderer.text_ids(" né 😀!"),
        generator.renderer.end_of_turn,
        *generator.renderer.text_ids("x"),
    ]
    monkeypatch.setattr(Generator, "_tokens", lambda self, *_: ([token] for token in answer))
    assert [piece for piece in generator.text_stream([], "hi") if piece] == ["n", "é", " 😀", "!"]
    assert generator.text([[]], ["hi"]) == ["né 😀!"]


def test_special_tokens_are_never_written(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    special = set(generator.renderer.special_ids) - {generator.renderer.end_of_turn}
    head = generator.pisces.llm.get_output_embeddings()

    def eager(hidden: Tensor) -> Tensor:
        logits = head(hidden).clone()
        logits[:, sorted(special)] += 1000.0
        return logits

    monkeypatch.setattr(generator.pisces.llm, "get_output_embeddings", lambda: eager)
    turns = [(Turn("user", ("hi",)),)]
    for temperature in (0.0, 1.0):
        written = {token for (token,) in generator._tokens(turns, [()], 20, temperature, 0, None)}
        assert len(special) == 8 and not written & special


def test_an_answer_ends_with_its_turn(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, ids = generator.renderer.end_of_turn, generator.renderer.text_ids("abc")
    columns = [[ids[0], stop], [ids[1], ids[2]], [stop, ids[2]], [ids[2], ids[2]]]
    asked = iter(columns)
    monkeypatch.setattr(Generator, "_tokens", lambda self, *_: asked)
    assert generator.text([[], []], ["x", "y"]) == ["ab", ""]
    assert list(asked) == [columns[3]]  # nothing is computed once all rows have ended


# ------------------------------------------------------------------------------------------------- refused prompts


@pytest.mark.parametrize("prompt", ["", "  \n\t"])
def test_an_empty_prompt_is_refused(generator: Generator, prompt: str) -> None:
    for refused in (lambda: generator.image(["fine", prompt]), lambda: generator.text([[]], [prompt])):
        with pytest.raises(PromptError, match="the prompt is empty"):
            refused()
    with pytest.raises(PromptError, match="the prompt is empty"):
        next(generator.text_stream([], prompt))


def test_an_over_long_prompt_is_refused_by_name_and_the_longest_is_not(generator: Generator) -> None:
    frame = len(generator.renderer.render((Turn("user", ("",)),), answer_next=True).ids)
    longest = "x" * (generator.max_prompt_tokens - frame)
    assert generator.text([[]], [longest], 1)
    with pytest.raises(
        PromptError, match=rf"'x+ \.\.\. x+' takes {generator.max_prompt_tokens + 1} tokens.*shorten it"
    ):
        generator.text([[]], ["x" + longest], 1)
    with pytest.raises(PromptError, match="yyyy"):
        generator.image(["fine", "y" * 600])
    with pytest.raises(PromptError, match="with its pictures"):  # 16 places and two tokens each
        generator.text([[picture(0)] * 40], ["what?"], 1)


def test_as_many_lists_of_pictures_as_prompts_are_wanted(generator: Generator) -> None:
    with pytest.raises(PromptError, match="2 prompts for 1 lists"):
        generator.text([[]], ["a", "b"])


# --------------------------------------------------------------------------------------------------- conversations

AFTER_DRAWING = (Turn("user", ("Draw: a ball",)), Turn("assistant", (0,)), Turn("user", ("Which colour is it?",)))


def test_a_conversation_goes_on_after_a_drawn_picture_with_the_vectors_that_were_written(exact: Generator) -> None:
    drawn = exact.image(["a ball"], steps=1)[0][0]
    vectors = exact.vectors(["a ball"])
    answer = exact.answer([AFTER_DRAWING], [(drawn,)], 16, vectors=vectors)
    assert exact.answer([AFTER_DRAWING], [(drawn,)], 16, vectors=vectors) == answer
    assert exact.answer([AFTER_DRAWING], [(drawn,)], 16, vectors=vectors * -9) != answer


def test_without_its_vectors_a_drawn_picture_is_encoded_again(exact: Generator) -> None:
    shown = picture(5)
    encoded = exact.encode([shown])
    assert exact.answer([AFTER_DRAWING], [(shown,)], 16) == exact.answer(
        [AFTER_DRAWING], [(shown,)], 16, vectors=encoded
    )


@torch.inference_mode()
def test_a_drawn_picture_is_seen_again_through_the_understanding_encoder(exact: Generator) -> None:
    vectors = exact.vectors(["a ball"])
    batches = [replace(exact.prompt([AFTER_DRAWING], [(picture(i),)]), generation_vectors_BME=vectors) for i in (1, 2)]
    states = [torch.stack([p.hidden_D for p in exact.read(batch)]) for batch in batches]
    assert (states[0] - states[1]).abs().max() > 1e-4


def test_rows_are_repeated_with_their_own_pictures(exact: Generator) -> None:
    """As a head that samples needs them: one row for each picture of a prompt, with what that prompt shows."""
    turns = [(Turn("user", (0, "a")),), (Turn("user", ("b",)),), (Turn("user", (0, 1, "c")),)]
    shown = [(picture(1),), (), (picture(2), picture(3))]
    batch = exact.prompt(turns, shown)
    rows = repeated(batch, 2, exact.renderer.N)
    expected = exact.prompt([one for one in turns for _ in range(2)], [one for one in shown for _ in range(2)])
    for name in ("ids_BS", "understanding_at_K", "understanding_pixels_BCHW"):
        assert torch.equal(getattr(rows, name), getattr(expected, name)), name


# --------------------------------------------------------------------------------------------------------- folders


def test_a_model_folder_draws_and_answers_as_the_model_it_was_written_from(
    nano_folder: Path, nano_pisces: Pisces, nano_tokenizer: Any
) -> None:
    loaded, original = Generator.from_pretrained(nano_folder, "cpu"), Generator(nano_pisces, nano_tokenizer, "cpu")
    assert loaded.text([[picture(0)]], ["What?"], 8) == original.text([[picture(0)]], ["What?"], 8)
    first, second = (g.image(["a ball"], steps=2)[0][0] for g in (loaded, original))
    assert first.tobytes() == second.tobytes()


def test_a_bf16_model_answers_draws_and_reconstructs(nano_pisces: Pisces, nano_tokenizer: Any) -> None:
    # What an accelerator runs in: every cast between the parts is crossed once.
    narrow = Generator(copy.deepcopy(nano_pisces).to(torch.bfloat16), nano_tokenizer, "cpu")
    wide = Generator(nano_pisces, nano_tokenizer, "cpu")
    assert len(narrow.text([[picture(0)], []], ["What?", "Why?"], 4)) == 2
    narrow.answer([AFTER_DRAWING], [(picture(0),)], 4, vectors=narrow.vectors(["a ball"]))
    for ours, theirs in ((g.image(["a ball"], steps=2)[0][0] for g in (narrow, wide)),):
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).mean() < 8
    assert narrow.reconstruct([picture(0)], steps=1)[0].size == (32, 32)


def test_after_m_passes_training_feeds_what_generation_feeds(exact: Generator) -> None:
    """`Pisces.feed_own`: pass k makes vector k the one that drawing would feed; the loss is then that of drawing."""
    pisces, captions = exact.pisces, PROMPTS[:3]
    turns = [(*generation_turns(caption), Turn("assistant", (0,))) for caption in captions]
    images = [(picture(i),) for i in range(3)]
    batch = collate([exact.renderer.render(t) for t in turns], images, exact.renderer, *exact.sizes)
    batch = replace(batch, total_vectors=len(batch.generation_at_K))
    written = exact.vectors(captions).double()
    with torch.no_grad():
        inputs, targets = pisces.embed(batch)
        for _ in range(exact.renderer.M):
            inputs = pisces.feed_own(inputs, batch)
        fed = inputs.flatten(0, 1)[batch.generation_at_K]
        assert torch.allclose(fed, pisces.bridge.generation_projector(written).flatten(0, 1), atol=1e-5)
        before = pisces.weights
        try:
            pisces.weights = LossConfig(own_passes=exact.renderer.M)
            free = pisces(batch).parts["vectors"]
        finally:
            pisces.weights = before
        assert torch.allclose(free, (written - targets).pow(2).mean().to(free.dtype), rtol=1e-5)
        assert not torch.allclose(free, pisces(batch).parts["vectors"], rtol=1e-3)


def test_guidance_can_turn_away_from_the_decoders_dropped_condition(nano_folder: Path) -> None:
    generator = Generator.from_pretrained(nano_folder, "cpu")
    assert torch.equal(generator.null_condition, generator.null_vectors)
    settings = generator.pisces.settings
    dropped = settings.decoder.model_copy(update={"null_condition": "dropped"})
    generator.pisces.settings = settings.model_copy(update={"decoder": dropped})
    statistics = generator.pisces.bridge.statistics
    assert torch.equal(generator.null_condition, statistics.null_ME)
    assert not torch.equal(generator.null_condition, generator.null_vectors)
    given: list[Any] = []
    honest = generator.painter.pixels
    generator.painter.pixels = lambda v, null, *more, **named: given.append(null) or honest(v, null, *more)  # type: ignore[method-assign, func-returns-value]
    generator.image(["a cat"], steps=1)
    assert torch.equal(given[0], statistics.null_ME)
