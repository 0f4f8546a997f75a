"""The engine: what one client gets does not depend on the others, to the bit; places are freed; limits are told."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image

from open_pisces.batch import Turn
from open_pisces.data.prompts import generation_turns
from open_pisces.generate.generator import Generator, PromptError
from open_pisces.generate.prefixes import PrefixStore, pieces_of
from open_pisces.generate.sampling import draw_token
from open_pisces.generate.slots import Prefix
from open_pisces.model.folder import WEIGHTS
from open_pisces.serve.engine import Engine
from open_pisces.serve.requests import Event, Request, caption_of

PROMPTS = ("a red heart on a blue background", "two green frogs", "a cat left of a dog", "three blue stars", "a banana")


@pytest.fixture(scope="module")
def generator() -> Generator:
    """The shipped model, in float32 on the CPU."""
    return Generator.from_pretrained(WEIGHTS, "cpu")


@pytest.fixture(scope="module")
def heart(generator: Generator) -> Image:
    return generator.image([PROMPTS[0]])[0][0]


def drawing(prompt: str, **settings: Any) -> Request:
    return Request(generation_turns(prompt), mode="image", **{"steps": 3, **settings})


def question(picture: Image, words: str, **settings: Any) -> Request:
    return Request((Turn("user", (0, words)),), (picture,), **settings)


def run(engine: Engine, **requests: Request) -> dict[str, list[Event]]:
    """What happens to requests that are taken together."""
    for id, request in requests.items():
        engine.submit(id, request)
    told: dict[str, list[Event]] = {id: [] for id in requests}
    while engine.busy:
        for event in engine.step():
            told[event.id].append(event)
    return told


def drawn(events: list[Event]) -> np.ndarray:
    """The pixels of a request's pictures, in their order."""
    found = {event.data["index"]: np.asarray(event.image) for event in events if event.kind == "picture"}
    return np.stack([found[index] for index in sorted(found)])


def said(events: list[Event]) -> str:
    return "".join(event.data["text"] for event in events if event.kind == "text")


# --------------------------------------------------------------------------------------------- alone and in a batch


@pytest.mark.parametrize("scales", [{}, {"guidance_scale": 1.0}, {"vector_guidance": 1.0}])
def test_a_picture_has_the_same_bits_alone_and_among_others(
    generator: Generator, heart: Image, scales: dict[str, float]
) -> None:
    requests = {f"p{i}": drawing(prompt, seed=i, n=1 + i % 2, **scales) for i, prompt in enumerate(PROMPTS)}
    others = {"q": question(heart, "What is in the picture?"), "slow": drawing("a tree", steps=7, guidance_scale=2.0)}
    together = latents(Engine(generator), **others, **requests)
    for id, request in requests.items():
        alone = latents(Engine(generator), **{id: request})
        assert len(alone) == request.n
        assert all(torch.equal(one, together[key]) for key, one in alone.items()), id


def latents(engine: Engine, **requests: Request) -> dict[tuple[str, int], torch.Tensor]:
    """What pictures are made of, by request and number: in float32, which 256 levels of a picture would hide."""
    found = {}
    show = engine.pictures._show

    def kept(picture: Any, kind: str, latents_BCHW: torch.Tensor, data: Any) -> list[Event]:
        found[picture.id, picture.number] = latents_BCHW
        return show(picture, kind, latents_BCHW, data)

    engine.pictures._show = kept  # type: ignore[method-assign]
    run(engine, **requests)
    return found


def test_an_answer_is_the_same_alone_and_among_others(generator: Generator, heart: Image) -> None:
    asked = {"a": "What is in the picture?", "b": "What color is the heart?", "c": "Describe the image in detail."}
    asked["d"] = "What color is the background?"
    requests = {id: question(heart, words, temperature=0.7, seed=3) for id, words in asked.items()}
    together = run(Engine(generator), draw=drawing("a cat"), **requests)
    for id, request in requests.items():
        alone = run(Engine(generator), **{id: request})[id]
        assert said(alone) == said(together[id])
        assert alone[-1].data["new"] == together[id][-1].data["new"]


def test_it_draws_and_answers_as_the_generator_does(generator: Generator, heart: Image) -> None:
    told = run(Engine(generator), draw=drawing(PROMPTS[2], n=2, seed=4), ask=question(heart, "What is in the picture?"))
    expected = np.stack([np.asarray(one) for one in generator.image([PROMPTS[2]], 2, steps=3, seed=4)[0]])
    assert np.abs(drawn(told["draw"]).astype(int) - expected).max() <= 1  # one level of rounding
    assert said(told["ask"]) == generator.text([[heart]], ["What is in the picture?"])[0]


def test_pictures_of_a_head_that_samples_differ_and_are_the_generators(nano_pisces: Any, nano_tokenizer: Any) -> None:
    from open_pisces.config import BridgeConfig
    from open_pisces.model.heads import FlowHead

    width = nano_pisces.bridge.head.width
    torch.manual_seed(0)
    head = FlowHead(nano_pisces.llm.config.hidden_size, width, BridgeConfig(head="flow", flow_width=16))
    torch.nn.init.normal_(head.leave.weight)
    sampling = copy.deepcopy(nano_pisces)
    sampling.bridge.head = head
    generator = Generator(sampling, nano_tokenizer, "cpu")
    request = drawing("a red ball", n=3, seed=2, steps=2, guidance_scale=1.0)
    found = drawn(run(Engine(generator), a=request)["a"])
    expected = generator.image(["a red ball"], 3, steps=2, seed=2, guidance_scale=1.0)[0]
    assert np.abs(found.astype(int) - np.stack([np.asarray(one) for one in expected])).max() <= 1
    assert np.abs(found[0].astype(int) - found[1]).max() > 1
    assert (drawn(run(Engine(generator, slots=2), a=request)["a"]) == found).all()  # one at a time


# ----------------------------------------------------------------------------------------------------- what is told


def test_a_drawing_tells_its_progress_and_shows_previews(generator: Generator) -> None:
    events = run(Engine(generator), a=drawing(PROMPTS[0], n=2, steps=4, previews=1))["a"]
    M = generator.renderer.M
    assert [event.data["done"] for event in events if event.kind == "vectors"] == list(range(1, M + 1))
    steps = [event.data["done"] for event in events if event.kind == "step" and event.data["index"] == 1]
    assert steps == [1, 2, 3, 4]
    previews = [event for event in events if event.kind == "preview"]
    assert [(event.data["index"], event.data["done"]) for event in previews] == [(0, 2), (1, 2)]
    last = drawn(events)[0].astype(int)
    assert np.abs(np.asarray(previews[0].image) - last).mean() < np.abs(last - last.mean((0, 1))).mean()
    assert events[-1].kind == "done"
    assert events[-1].data == {"finish_reason": "stop", "prompt": 31, "known": 0, "new": M + 1}


def test_the_model_decides_whether_to_draw(generator: Generator, heart: Image) -> None:
    words = Request(
        (Turn("user", ("a red heart",)),), mode="auto", n=2, steps=2, to_draw=generation_turns("a red heart")
    )
    asked = question(heart, "What is in the picture?", mode="auto")
    told = run(Engine(generator), words=words, asked=asked)
    assert len(drawn(told["words"])) == 2 and not said(told["words"])
    assert said(told["asked"]) == "red heart"
    asked_to = drawn(run(Engine(generator), a=drawing("a red heart", steps=2, n=2))["a"])
    assert (drawn(told["words"]) == asked_to).all()  # in the wording that it was trained with


@pytest.mark.parametrize(
    ("words", "caption"),
    [
        ("Draw a red heart", "a red heart"),
        ("please draw me two cats.", "two cats."),
        ("Can you paint a picture of a dog", "a dog"),
        ("Generate an image of a tree", "a tree"),
        ("Draw: a sun", "a sun"),
        ("a drawing of a cat", "a drawing of a cat"),
        ("drawer", "drawer"),
        ("draw", "draw"),
    ],
)
def test_the_words_that_ask_for_a_picture_are_no_part_of_its_caption(words: str, caption: str) -> None:
    assert caption_of(words) == caption


def test_an_answer_ends_before_its_stop_text_and_tells_no_part_of_it(generator: Generator, heart: Image) -> None:
    whole = said(run(Engine(generator), a=question(heart, "Describe the image in detail."))["a"])
    stop = whole[10:16]
    told = run(Engine(generator), a=question(heart, "Describe the image in detail.", stop=(stop, "never")))["a"]
    assert said(told) == whole[: whole.find(stop)]
    assert told[-1].data["finish_reason"] == "stop"
    untouched = run(Engine(generator), a=question(heart, "Describe the image in detail.", stop=(whole[-1] + "!",)))["a"]
    assert said(untouched) == whole


def test_an_answer_that_is_cut_says_so(generator: Generator, heart: Image) -> None:
    told = run(Engine(generator), a=question(heart, "Describe the image in detail.", max_new_tokens=3))["a"]
    assert told[-1].data["finish_reason"] == "length" and told[-1].data["new"] == 3
    assert said(told)


def test_a_nucleus_leaves_the_likeliest_tokens() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draw = torch.Generator().manual_seed(0)
    found = [draw_token(logits, 1.0, draw, 0.7) for _ in range(200)]
    assert set(found) == {0, 1} and 100 < found.count(0) < 150
    assert {draw_token(logits, 1.0, draw, 1e-9) for _ in range(20)} == {0}
    assert {draw_token(logits, 1e-40, draw) for _ in range(20)} == {0}  # no NaN, which would end all requests
    assert {draw_token(logits, 0.0, draw) for _ in range(20)} == {0}


def test_draws_follow_the_chances_and_never_take_what_has_none() -> None:
    chances = torch.tensor([0.0, 0.6, 0.0, 0.3, 0.1, 0.0])
    draw = torch.Generator().manual_seed(0)
    found = torch.tensor([draw_token(chances.log(), 1.0, draw) for _ in range(20_000)])
    shares = torch.bincount(found, minlength=6) / len(found)
    torch.testing.assert_close(shares, chances, rtol=0, atol=0.012)
    assert (shares > 0).tolist() == (chances > 0).tolist()


# ------------------------------------------------------------------------------------------------------- the places


def test_more_requests_than_places_wait_and_are_served_in_turn(generator: Generator, heart: Image) -> None:
    engine = Engine(generator, slots=2, pictures=2)
    requests = {f"r{i}": drawing(PROMPTS[i], steps=2) for i in range(3)}
    told = run(engine, **requests, ask=question(heart, "What is in the picture?"))
    assert [events[-1].kind for events in told.values()] == ["done"] * 4
    assert engine.counts() | {"prefix_bytes": 0} == {"waiting": 0, "sequences": 0, "pictures": 0, "prefix_bytes": 0}


def test_a_cancelled_request_leaves_at_once_and_changes_no_other(generator: Generator) -> None:
    engine = Engine(generator)
    engine.submit("stays", drawing(PROMPTS[1], seed=1))
    engine.submit("writes", drawing(PROMPTS[0]))
    engine.submit("waits", drawing(PROMPTS[2]))
    for _ in range(5):
        engine.step()
    engine.cancel("writes")
    engine.cancel("waits")
    assert len(engine.sequences) == 1 and engine.slots.lengths.count(0) == 6
    told = [event for event in iter_steps(engine)]
    assert {event.id for event in told} == {"stays"}
    alone = drawn(run(Engine(generator), stays=drawing(PROMPTS[1], seed=1))["stays"])
    assert (drawn(told) == alone).all()
    engine.submit("paints", drawing(PROMPTS[0], steps=50))
    while not engine.pictures.pictures:
        engine.step()
    engine.cancel("paints")
    assert not engine.busy


def iter_steps(engine: Engine) -> list[Event]:
    found = []
    while engine.busy:
        found += engine.step()
    return found


def test_what_cannot_be_served_is_said_when_it_comes(generator: Generator, heart: Image) -> None:
    engine = Engine(generator, context=128)
    with pytest.raises(PromptError, match="takes .* tokens with its pictures.*this server takes 128"):
        engine.submit("a", question(heart, "What is it? " * 40))
    with pytest.raises(PromptError, match="vector_guidance -1"):
        engine.submit("a", drawing("a cat", vector_guidance=-1.0))
    with pytest.raises(PromptError, match="temperature -1"):
        engine.submit("a", drawing("a cat", variety=-1.0))
    assert not engine.busy
    blind = Generator(generator.pisces, generator.tokenizer, "cpu")
    decoder, blind.pisces.decoder = blind.pisces.decoder, None
    try:
        with pytest.raises(PromptError, match="no decoder"):
            Engine(blind).submit("a", drawing("a cat"))
    finally:
        blind.pisces.decoder = decoder


def test_pixels_that_are_no_numbers_fail_their_own_request(generator: Generator) -> None:
    engine = Engine(generator)
    engine.submit("good", drawing(PROMPTS[0], seed=1))
    engine.submit("bad", drawing(PROMPTS[1]))
    while len(engine.pictures.pictures) < 2:
        engine.step()
    bad = next(picture for picture in engine.pictures.pictures if picture.id == "bad")
    bad.latents_BCHW = bad.latents_BCHW * float("nan")
    told = iter_steps(engine)
    assert [(event.id, event.data["message"][:11]) for event in told if event.kind == "error"] == [
        ("bad", "pixels hold")
    ]
    assert [event.id for event in told if event.kind == "done"] == ["good"]


# ------------------------------------------------------------------------------------------------ what is remembered


def test_a_second_question_reads_only_what_is_new_and_gets_the_same_bits(generator: Generator, heart: Image) -> None:
    engine = Engine(generator)
    first = question(heart, "What is in the picture?")
    second = question(heart, "What color is the background?")
    run(engine, a=first)
    told = run(engine, a=second)["a"]
    N = generator.renderer.N
    assert told[-1].data["known"] > N
    store, fresh = engine.prefixes, PrefixStore(generator)
    rendered = generator.renderer.render(second.turns, answer_next=True)
    known, unknown = store.read(rendered, (heart,))[0], fresh.read(rendered, (heart,))[0]
    assert all(torch.equal(one, other) for one, other in zip(known.keys, unknown.keys, strict=True))
    assert torch.equal(known.hidden_D, unknown.hidden_D)
    whole = generator.read(generator.prompt([second.turns], [(heart,)]))[0]
    assert torch.allclose(whole.hidden_D, unknown.hidden_D, atol=1e-4)


def test_a_picture_is_encoded_once(generator: Generator, heart: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    encoder = generator.pisces.understanding_encoder
    honest = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda pixels: calls.append(len(pixels)) or honest(pixels))
    engine = Engine(generator)
    run(engine, a=question(heart, "What is it?"), b=Request((Turn("user", ("Look", 0, "?")),), (heart,)))
    assert calls == [1]
    run(engine, a=question(heart.rotate(90), "What is it?"))
    assert calls == [1, 1]


def test_other_pictures_in_the_same_words_are_read_anew(generator: Generator, heart: Image) -> None:
    store = PrefixStore(generator)
    rendered = generator.renderer.render((Turn("user", (0, "What is it?")),), answer_next=True)
    one, other = store.read(rendered, (heart,)), store.read(rendered, (heart.rotate(90),))
    assert not torch.equal(one[0].hidden_D, other[0].hidden_D) and other[1] == 0


def test_the_store_keeps_within_its_memory(generator: Generator, heart: Image) -> None:
    store = PrefixStore(generator, max_bytes=200_000)
    for words in PROMPTS:
        rendered = generator.renderer.render((Turn("user", (0, words)),), answer_next=True)
        store.read(rendered, (heart,))
        assert store.nbytes <= 200_000
        assert store.nbytes == sum(size for _, size in store.kept.values())
    prefixes = [kept for kept, _ in store.kept.values() if isinstance(kept, Prefix)]
    tensors = [tensor for prefix in prefixes for tensor in (*prefix.keys, *prefix.values, prefix.hidden_D)]
    assert tensors and all(one.untyped_storage().nbytes() == one.nbytes for one in tensors)  # no slices of larger ones


def test_pieces_end_after_pictures_and_turns_and_join_to_the_prompt(generator: Generator, heart: Image) -> None:
    turns = (Turn("user", (0, "first")), Turn("assistant", ("yes",)), Turn("user", (1, 2, "second")))
    turns += (Turn("assistant", (3,)), Turn("user", ("third",)))
    rendered = generator.renderer.render(turns, answer_next=True)
    pieces = pieces_of(rendered, generator.renderer)
    assert [token for piece in pieces for token in piece.ids] == rendered.ids
    assert [i for piece in pieces for i in piece.understanding_images] == rendered.understanding_images == [0, 1, 2, 3]
    assert [i for piece in pieces for i in piece.generation_images] == rendered.generation_images == [3]
    N, M = generator.renderer.N, generator.renderer.M
    assert all(sum(piece.understanding) == N * len(piece.understanding_images) for piece in pieces)
    assert all(sum(piece.generation) == M * len(piece.generation_images) for piece in pieces)
    pictures = tuple(heart.rotate(90 * i) for i in range(4))
    found = PrefixStore(generator).read(rendered, pictures)[0]
    whole = generator.read(generator.prompt([turns], [pictures]))[0]
    assert torch.allclose(found.hidden_D, whole.hidden_D, atol=1e-4) and found.length == whole.length
