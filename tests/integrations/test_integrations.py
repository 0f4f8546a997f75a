"""The adapters to lmms-eval and VLMEvalKit, without those packages: small stand-ins take the place of their classes.

The stand-ins do what lmms-eval 0.7.3 and VLMEvalKit (vlmeval/vlm/base.py) do where the adapters touch them;
``scripts/try_lmms_eval.sh`` runs the adapter in the real lmms-eval. Where a package is installed, it is used instead.
"""

from __future__ import annotations

import abc
import copy
import importlib
import json
import mimetypes
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from PIL.Image import Image

from open_pisces.batch import Turn
from open_pisces.data.images import ImageError
from open_pisces.data.shards import ShardReader, data_path
from open_pisces.generate.generator import Generator, PromptError
from open_pisces.generate.messages import Conversation, HarnessError, as_image, read_messages
from open_pisces.integrations import lmms_eval, vlmeval
from open_pisces.integrations.lmms_eval import Decoding, carried, cut, log_likelihoods, own_device, read_decoding
from open_pisces.model.pisces import Pisces

ROOT = Path(__file__).parents[2]
GREEDY = {"max_new_tokens": 12, "temperature": 0, "do_sample": False, "until": []}


def picture(seed: int) -> Image:
    return Pillow.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def exact(nano_pisces: Pisces, nano_tokenizer: Any) -> Generator:
    """Large weights, so that answers depend on every token; float64, so that they do not depend on rounding.

    Bytes that are no printable ASCII have embeddings of 0: they are never the likeliest, so answers can be read.
    """
    changed = copy.deepcopy(nano_pisces)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in (*changed.llm.parameters(), *changed.bridge.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
        silent = [i for i in range(256) if not "!" <= nano_tokenizer.convert_ids_to_tokens(i) <= "~"]
        changed.llm.get_input_embeddings().weight[silent] = 0.0
    return Generator(changed.double(), nano_tokenizer, "cpu")


# ------------------------------------------------------------------------------------------------- lmms-eval's side


class _Lmms(abc.ABC):
    """What of ``lmms_eval.api.model.lmms`` the adapter and the evaluator rely on."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}  # type: ignore[var-annotated]

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any]) -> Any:
        """``a=1,b=c`` and, from the command line, batch size and device where they were given."""
        pairs = dict(pair.split("=") for pair in arg_string.split(",") if pair)
        return cls(**pairs, **{name: value for name, value in additional_config.items() if value is not None})

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    def clean(self) -> None:
        self.cleaned = True


@dataclass
class _GenerationResult:
    text: Any
    token_counts: Any = None


def _unwrap(output: Any) -> tuple[Any, Any]:
    """Release 0.7.3: texts and lists of texts pass, a result gives what it holds, and all else becomes text."""
    if isinstance(output, _GenerationResult):
        return output.text, output.token_counts
    passes = isinstance(output, str) or (isinstance(output, list) and all(isinstance(part, str) for part in output))
    return (output if passes else str(output)), None


@dataclass(frozen=True)
class _Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class Instance:
    """One request: what the adapter reads of ``lmms_eval.api.instance.Instance``."""

    args: tuple[Any, ...]
    resps: list[Any] = field(default_factory=list)


def stand_in(monkeypatch: pytest.MonkeyPatch, package: str, modules: dict[str, dict[str, Any]]) -> None:
    """Modules of a package that is not installed."""
    if find_spec(package) is None:
        for name, content in {package: {}, **modules}.items():
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        monkeypatch,
        "lmms_eval",
        {
            "lmms_eval.api": {},
            "lmms_eval.api.model": {"lmms": _Lmms},
            "lmms_eval.api.instance": {"GenerationResult": _GenerationResult, "unwrap_generation_output": _unwrap},
            "lmms_eval.models": {},
            "lmms_eval.models.registry_v2": {"ModelManifest": _Manifest},
        },
    )


DOCS: list[dict[str, Any]] = [
    {"question": "What is this?", "pictures": [0]},
    {"question": "Which of the two is larger, and why is it so?", "pictures": [1, 2]},
    {"question": "What is 2 + 2?", "pictures": []},
    {"question": "é", "pictures": [3]},
]


def messages_of(doc: dict[str, Any], **known: Any) -> Any:
    """A task's ``doc_to_messages``: the pictures, then the words, as lmms-eval writes them by itself."""
    shown = [{"type": "image", "url": picture(number)} for number in doc["pictures"]]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": doc["question"]}]}]


def visuals_of(doc: dict[str, Any]) -> list[Image]:
    return [picture(number) for number in doc["pictures"]]


def chat_request(number: int, kwargs: dict[str, Any] = GREEDY, messages: Callable[..., Any] = messages_of) -> Instance:
    return Instance(("", messages, kwargs, number, "toy", "test"))


def simple_request(number: int, kwargs: dict[str, Any] = GREEDY) -> Instance:
    return Instance((DOCS[number]["question"], kwargs, visuals_of, number, "toy", "test"))


@pytest.fixture
def make(harness: None, nano_folder: Path, exact: Generator) -> Callable[..., Any]:
    """A model of one form, made as lmms-eval makes it, with `exact` in the place of its nano weights."""

    def made(form: str, batch_size: int = 3, arguments: str = "") -> Any:
        kind = getattr(lmms_eval, form)
        model = kind.create_from_arg_string(
            f"pretrained={nano_folder}{arguments}", {"batch_size": str(batch_size), "device": "cpu", "extra": None}
        )
        model.generator = exact
        model.task_dict["toy"] = {"test": DOCS}
        return model

    return made


def directly(generator: Generator, doc: dict[str, Any], **more: Any) -> str:
    return generator.text([visuals_of(doc)], [doc["question"]], 12, **more)[0]


# -------------------------------------------------------------------------------------------------- how it is found


def test_without_lmms_eval_the_module_imports_and_its_classes_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("lmms_eval", "lmms_eval.api.model", "lmms_eval.api.instance"):
        monkeypatch.setitem(sys.modules, name, None)  # importing them now fails as if they were not installed
    with pytest.raises(ImportError, match=r"PiscesChat needs lmms-eval .* pip install 'open-pisces\[lmms-eval\]'"):
        from open_pisces.integrations.lmms_eval import PiscesChat  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'PiscesTalk'"):
        _ = lmms_eval.PiscesTalk


def test_the_manifest_names_classes_that_the_registry_accepts(harness: None) -> None:
    manifest = lmms_eval.manifest()
    base = importlib.import_module("lmms_eval.api.model").lmms
    assert manifest.model_id == "pisces" and manifest.aliases == ("open_pisces",)
    for path, is_simple in ((manifest.simple_class_path, True), (manifest.chat_class_path, False)):
        module, _, name = path.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        assert issubclass(found, base) and found.is_simple is is_simple and not found.__abstractmethods__
        assert found.__name__ == name and found is getattr(lmms_eval, name)


def test_the_entry_point_is_the_manifest() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = points["lmms_eval.models"]["pisces"].partition(":")
    assert getattr(importlib.import_module(module), name) is lmms_eval.manifest


def test_a_model_is_made_from_its_folder_and_lets_go_of_it(harness: None, nano_folder: Path) -> None:
    model = lmms_eval.PiscesChat(str(nano_folder), "cpu", 2)
    model.task_dict["toy"] = {"test": DOCS}
    weights = Generator.from_pretrained(nano_folder, "cpu")
    assert model.generate_until([chat_request(0)]) == [directly(weights, DOCS[0])]
    assert model.device == torch.device("cpu")
    model.clean()
    assert not hasattr(model, "generator") and getattr(model, "cleaned", True)


@pytest.mark.parametrize("given", ["auto", "0", "-1", "2.5"])
def test_a_batch_size_that_is_no_number_is_refused(harness: None, given: str) -> None:
    with pytest.raises(HarnessError, match=f"batch_size={given}: give a number of at least 1"):
        lmms_eval.PiscesSimple(batch_size=given)
    with pytest.raises(HarnessError, match="choices=loudest: give loss or log_probability"):
        lmms_eval.PiscesSimple(choices="loudest")


def test_each_process_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [own_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:3", "cuda:1", "cpu"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert own_device("auto") == "auto"


# --------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(("form", "request_of"), [("PiscesChat", chat_request), ("PiscesSimple", simple_request)])
def test_a_batch_answers_as_one_by_one_and_as_the_generator(
    make: Callable[..., Any], exact: Generator, form: str, request_of: Callable[..., Instance]
) -> None:
    order = [2, 0, 3, 1]  # one picture, two, none: mixed in a batch
    expected = [directly(exact, DOCS[number]) for number in order]
    assert len(set(expected)) == 4  # a stuck model would make this an easy test
    for size in (1, 3, 8):
        assert make(form, size).generate_until([request_of(number) for number in order]) == expected


def test_requests_that_decode_differently_keep_their_places(make: Callable[..., Any], exact: Generator) -> None:
    short = {**GREEDY, "max_new_tokens": 3}
    answers = make("PiscesChat").generate_until([chat_request(0, short), chat_request(1), chat_request(1, short)])
    brief = [exact.text([visuals_of(DOCS[number])], [DOCS[number]["question"]], 3)[0] for number in (0, 1)]
    assert answers == [brief[0], directly(exact, DOCS[1]), brief[1]]


def test_an_answer_ends_before_the_first_of_the_strings_that_end_it(make: Callable[..., Any], exact: Generator) -> None:
    answers = [directly(exact, doc) for doc in DOCS]
    # A character inside an answer that did not come before: what is left is neither empty nor the whole.
    number, at = next((n, i) for n, told in enumerate(answers) for i in range(1, len(told)) if told[i] not in told[:i])
    kwargs = {**GREEDY, "until": ["no such string", answers[number][at]]}
    assert make("PiscesChat").generate_until([chat_request(number, kwargs)]) == [answers[number][:at]]
    assert cut("a\n\nb. c", ["."]) == "a\n\nb" and cut("a\n\nb. c", [".", "\n\n"]) == "a"
    assert cut("abc", []) == "abc" and cut("abc", ["x"]) == "abc" and cut("abc", ["a"]) == ""


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, Decoding(128, 0.0, ())),
        ({"until": "\n\n", "max_new_tokens": 16, "num_beams": 1}, Decoding(16, 0.0, ("\n\n",))),
        ({"until": ["</s>", ""], "temperature": 0, "top_p": 0.9}, Decoding(128, 0.0, ("</s>",))),
        ({"do_sample": False, "temperature": 0.7}, Decoding(128, 0.0, ())),  # HF's rule: no sampling, no temperature
        ({"do_sample": True, "temperature": 0.7, "top_p": 1.0}, Decoding(128, 0.7, ())),
        ({"do_sample": True}, Decoding(128, 1.0, ())),  # HF's default temperature
        ({"temperature": 0.2, "max_new_tokens": None, "until": None}, Decoding(128, 0.2, ())),
    ],
)
def test_generation_settings(kwargs: dict[str, Any], expected: Decoding) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_decoding(kwargs, 128) == expected


@pytest.mark.parametrize(
    ("kwargs", "said"), [({"num_beams": 5}, "num_beams=5"), ({"temperature": 0.7, "top_p": 0.9}, "top_p=0.9")]
)
def test_settings_that_are_not_followed_are_said(kwargs: dict[str, Any], said: str) -> None:
    with pytest.warns(UserWarning, match=f"{said} is not supported"):
        read_decoding(kwargs, 128)


def test_no_more_tokens_are_asked_for_than_the_model_has_positions(
    make: Callable[..., Any], exact: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        Generator, "answer", lambda self, turns, images, n, *_: asked.append((len(turns), n)) or ["x"] * len(turns)
    )
    positions = exact.pisces.llm.config.max_position_embeddings
    long = {**GREEDY, "max_new_tokens": 49152}
    docs = [{"question": "x" * (positions - 300), "pictures": []}, {"question": "x" * (positions - 90), "pictures": []}]
    model = make("PiscesChat")
    model.task_dict["toy"] = {"test": [*docs, docs[0]]}
    model.generate_until([chat_request(number, long) for number in range(3)])
    frame = len(exact.renderer.render((Turn("user", ("",)),), answer_next=True).ids)
    assert asked == [(2, (300 - frame) // 128 * 128), (1, 90 - frame)]  # room rounded down, or what there is


def test_a_repeated_request_is_sampled_anew_and_the_same_in_any_batch(
    make: Callable[..., Any], exact: Generator
) -> None:
    sampled = {**GREEDY, "do_sample": True, "temperature": 1.0}
    first, second = chat_request(0, sampled), chat_request(1, sampled)
    expected = [directly(exact, DOCS[n], temperature=1.0, seed=seed) for n, seed in ((0, 5), (0, 6), (1, 5), (1, 6))]
    assert len(set(expected)) == 4
    for size in (1, 4):  # lmms-eval repeats the object itself
        assert make("PiscesChat", size, ",seed=5").generate_until([first, first, second, second]) == expected


# --------------------------------------------------------------------------------------------- requests that are bad


def test_a_row_that_cannot_be_used_is_named_and_the_others_are_answered(
    make: Callable[..., Any], exact: Generator, tmp_path: Path
) -> None:
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    bad = {"role": "user", "content": [{"type": "image", "url": str(tmp_path / "cut.png")}]}
    many = {"role": "user", "content": [{"type": "image", "url": picture(0)}] * 60}
    requests = [
        chat_request(0),
        chat_request(1, messages=lambda doc: [bad]),
        chat_request(2, messages=lambda doc: [many]),
    ]
    with pytest.warns(UserWarning) as said:
        answers = make("PiscesChat").generate_until([*requests, chat_request(3)])
    assert answers == [directly(exact, DOCS[0]), "", "", directly(exact, DOCS[3])]
    texts = [str(warning.message) for warning in said]
    assert any("toy, document 1: " in text and "cut.png" in text for text in texts)
    assert any("toy, document 2: " in text and "60 pictures among them" in text for text in texts)


def test_videos_and_sounds_are_refused(make: Callable[..., Any]) -> None:
    film = [{"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}]
    with pytest.raises(HarnessError, match="holds a video: this model takes text, and pictures of the user"):
        make("PiscesChat").generate_until([chat_request(0, messages=lambda doc: film)])
    with pytest.raises(HarnessError, match="a visual of type dict"):
        as_image({"array": [0.0], "sampling_rate": 16000})


# ----------------------------------------------------------------------------------------------------- several rounds


def rounds_of(doc: dict[str, Any], **known: Any) -> Any:
    """A task's ``doc_to_messages`` with as many rounds as the question has words, at most three."""
    if "round_idx" not in known:
        return messages_of(doc)
    said, notes = known["previous_output"], known["previous_round_info"] or []
    assert known["round_idx"] == len(said) and notes == list(range(1, len(said)))
    if len(said) >= min(3, len(doc["question"].split())):
        return None, True, [*said, "END"], None
    words = [{"type": "text", "text": f"You said {said[-1]!r}. Go on."}]
    return [{"role": "user", "content": words}], False, None, [*notes, len(said)]


def test_rounds_are_written_from_the_answers_before_them(make: Callable[..., Any], exact: Generator) -> None:
    numbers = [0, 3, 1]  # three rounds, one, three
    expected = []
    for number in numbers:
        told = [directly(exact, DOCS[number])]
        while len(told) < min(3, len(DOCS[number]["question"].split())):
            told += exact.text([[]], [f"You said {told[-1]!r}. Go on."], 12)
        expected.append([*told, "END"])  # the task has the last word on its record
    assert [len(told) for told in expected] == [4, 2, 4]
    for size in (1, 3):
        requests = [chat_request(number, messages=rounds_of) for number in numbers]
        assert make("PiscesChat", size).generate_until_multi_round(requests) == expected


def test_simple_rounds_have_pictures_of_their_own(make: Callable[..., Any], exact: Generator) -> None:
    def text_of(doc: dict[str, Any], previous_output: list[str], round_idx: int, previous_round_info: Any) -> Any:
        if round_idx == 2:
            return None, None, True, previous_output, None
        return [picture(9)], f"{previous_output[0]} and now?", False, previous_output, None

    requests = [Instance((DOCS[n]["question"], GREEDY, visuals_of, text_of, n, "toy", "test")) for n in (2, 0)]
    first = [directly(exact, DOCS[n]) for n in (2, 0)]
    second = [exact.text([[picture(9)]], [f"{said} and now?"], 12)[0] for said in first]
    found = make("PiscesSimple").generate_until_multi_round(requests)
    assert found == [list(pair) for pair in zip(first, second, strict=True)]


def test_a_task_without_rounds_has_one(make: Callable[..., Any], exact: Generator) -> None:
    assert make("PiscesChat").generate_until_multi_round([chat_request(0)]) == [[directly(exact, DOCS[0])]]


# ------------------------------------------------------------------------------------------------------- likelihoods


@torch.inference_mode()
def by_hand(generator: Generator, doc: dict[str, Any], words: str) -> tuple[float, bool]:
    """The LLM's own logits over the whole sequence, one token after the other."""
    renderer, pisces = generator.renderer, generator.pisces
    turns = (Turn("user", (*range(len(doc["pictures"])), doc["question"])),)
    ids = renderer.render(turns, answer_next=True).ids
    told = renderer.text_ids(words)
    inputs = pisces.llm.get_input_embeddings()(torch.tensor([ids + told]))
    if doc["pictures"]:
        pixels = np.stack([understood(image, generator.sizes[0]) for image in visuals_of(doc)])
        seen = pisces.understand(torch.from_numpy(pixels).to(inputs.dtype)).flatten(0, 1)
        inputs[0, [i for i, token in enumerate(ids) if token == renderer.placeholder]] = seen
    logits = pisces.llm(inputs_embeds=inputs).logits[0]
    value, greedy = 0.0, True
    for place, token in enumerate(told, start=len(ids) - 1):  # the place before a token predicts it
        row = logits[place]
        value += float(row[token] - row.exp().sum().log())
        allowed = [i for i in range(len(row)) if i not in renderer.special_ids or i == renderer.end_of_turn]
        greedy = greedy and max(allowed, key=lambda i: float(row[i])) == token
    return value, greedy


def understood(image: Image, size: int) -> np.ndarray:
    shrunk = image.resize((size, size), Pillow.Resampling.BICUBIC)
    return np.asarray(shrunk, np.float32).transpose(2, 0, 1) / 255


def test_a_likelihood_is_the_sum_of_the_models_own_log_probabilities(
    make: Callable[..., Any], exact: Generator
) -> None:
    written = exact.tokenizer.decode(
        [
            token
            for (token,) in exact._tokens([(Turn("user", (0, DOCS[0]["question"])),)], [(picture(0),)], 3, 0, 0, None)
        ]
    )
    words = [(0, "red"), (1, "the larger one"), (2, "4"), (3, "ü"), (0, written)]
    requests = [
        Instance((DOCS[n]["question"], lambda doc, told=told: told, visuals_of, n, "toy", "test")) for n, told in words
    ]
    expected = [by_hand(exact, DOCS[n], told) for n, told in words]
    assert [greedy for _, greedy in expected] == [False] * 4 + [True]
    for size in (1, 5):
        found = [held(pair) for pair in make("PiscesSimple", size).loglikelihood(requests)]
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], rtol=1e-9)
    assert all(value < 0 for value, _ in expected)


def held(pair: Any) -> tuple[float, bool]:
    """What lmms-eval makes of a result before it gives it to a task."""
    return importlib.import_module("lmms_eval.api.instance").unwrap_generation_output(pair)[0]


def test_the_likeliest_choice_has_the_smallest_value_which_release_0_7_3_takes(
    make: Callable[..., Any], exact: Generator
) -> None:
    """lmms_eval/api/task.py of 0.7.3: ``pred = np.argmin(lls)``, "since we return the actual loss"."""
    choices = [" red", " blue", " very long words"]
    requests = [Instance((DOCS[0]["question"], words, visuals_of, 0, "toy", "test")) for words in choices]
    expected = [by_hand(exact, DOCS[0], words.strip())[0] for words in choices]  # the template ends where words begin
    losses = [held(pair)[0] for pair in make("PiscesSimple").loglikelihood(requests)]
    np.testing.assert_allclose(losses, [-value for value in expected], rtol=1e-9)
    assert int(np.argmin(losses)) == int(np.argmax(expected))
    told = [held(pair)[0] for pair in make("PiscesSimple", 2, ",choices=log_probability").loglikelihood(requests)]
    np.testing.assert_allclose(told, expected, rtol=1e-9)


def test_without_context_or_visuals_a_likelihood_is_that_of_the_words_alone(
    make: Callable[..., Any], exact: Generator
) -> None:
    (pair,) = make("PiscesChat", 1, ",choices=log_probability").loglikelihood([Instance(("", "red"))])
    value, _ = by_hand(exact, {"question": "", "pictures": []}, "red")
    assert held(pair)[0] == pytest.approx(value, rel=1e-9)
    empty = log_likelihoods(exact, [Conversation((Turn("user", ("hi",)),))], ["  "])
    assert empty == [(0.0, True)]  # nothing is certain


def test_earlier_answers_of_a_conversation_are_not_counted(exact: Generator) -> None:
    turns = (Turn("user", ("a",)), Turn("assistant", ("long answer",)), Turn("user", ("b",)))
    (short, _), (longer, _) = log_likelihoods(exact, [Conversation(turns)] * 2, ["x", "xy"])
    ids = exact.renderer.render(turns, answer_next=True).ids + exact.renderer.text_ids("xy")
    logits = exact.pisces.llm(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logits[-3, ids[-2]].detach()), float(logits[-2, ids[-1]].detach())]
    assert short == pytest.approx(expected[0]) and longer == pytest.approx(sum(expected))


def test_a_likelihood_that_cannot_be_had_is_an_error(make: Callable[..., Any]) -> None:
    with pytest.raises(PromptError, match=r"tokens with its pictures, of \d+ .* continuation ' xxx.*shorten it"):
        make("PiscesSimple").loglikelihood([Instance(("hi", " " + "x" * 2000, visuals_of, 0, "toy", "test"))])


def test_a_bf16_model_tells_nearly_the_same_likelihoods(nano_pisces: Pisces, nano_tokenizer: Any) -> None:
    # What an accelerator runs in.
    rows = [read_messages(messages_of(doc)) for doc in DOCS]
    values = [
        [value for value, _ in log_likelihoods(Generator(pisces, nano_tokenizer, "cpu"), rows, ["red"] * 4)]
        for pisces in (nano_pisces, copy.deepcopy(nano_pisces).to(torch.bfloat16))
    ]
    np.testing.assert_allclose(*values, rtol=0.02)


def test_a_pair_passes_through_lmms_eval_as_a_pair(harness: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert held(carried((-1.5, True))) == (-1.5, True)
    monkeypatch.setitem(sys.modules, "lmms_eval.api.instance", None)
    assert carried((-1.5, True)) == (-1.5, True)


# ---------------------------------------------------------------------------------------------------------- messages


def content_of(conversation: Conversation) -> list[tuple[str, tuple[str | int, ...]]]:
    return [(turn.role, turn.content) for turn in conversation.turns]


def test_pictures_and_words_keep_their_order() -> None:
    content: list[dict[str, Any]] = [
        {"type": "text", "text": " Compare "},
        {"type": "image", "url": picture(1)},
        {"type": "text", "text": "with"},
        {"type": "image", "url": picture(2)},
        {"type": "text", "text": "Which is larger?\n"},
        {"type": "text", "text": "A. first"},
        {"type": "text", "text": " "},
    ]
    found = read_messages([{"role": "user", "content": content}])
    assert content_of(found) == [("user", ("Compare", 0, "with", 1, "Which is larger?\nA. first"))]
    assert [image.tobytes() for image in found.images] == [picture(n).tobytes() for n in (1, 2)]


def test_the_order_of_pictures_changes_the_answer(exact: Generator) -> None:
    rows = [read_messages(messages_of({"question": "Which?", "pictures": order})) for order in ([1, 2], [2, 1])]
    (one, _), (other, _) = log_likelihoods(exact, rows, ["red", "red"])
    assert abs(one - other) > 1e-3


def test_turns_roles_and_plain_strings() -> None:
    found = read_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image", "url": picture(0)}, {"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
            {"role": "user", "content": "now"},
        ]
    )
    expected = [("user", ("Be brief.", 0, "Hi")), ("assistant", ("Hello",)), ("user", ("Bye\nnow",))]
    assert content_of(found) == expected


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "0 turns that do not end with the user's"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "2 turns that do not end"),
        ([{"role": "tool", "content": "a"}], "role 'tool': this model knows system, user and assistant"),
        ([{"role": "assistant", "content": [{"type": "image", "url": "a.png"}]}], "of the assistant holds a image"),
    ],
)
def test_messages_that_are_no_conversation_are_refused(messages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(HarnessError, match=said):
        read_messages(messages)


@pytest.mark.parametrize(
    ("context", "count", "expected"),
    [
        ("What?", 0, ("What?",)),
        ("What?", 2, (0, 1, "What?")),
        ("<image> is left of <image>?", 2, (0, "is left of", 1, "?")),
        ("<image>\nWhat?", 1, (0, "What?")),
        ("the tag <image>?", 0, ("the tag <image>?",)),  # no picture for the mark: it is just text
        ("<image> and?", 2, (0, 1, "<image> and?")),
    ],
)
def test_the_pictures_of_a_simple_request(context: str, count: int, expected: tuple[str | int, ...]) -> None:
    shown = [picture(n) for n in range(count)]
    found = read_messages(lmms_eval.simple_messages(context, shown or None))
    assert found.turns == (Turn("user", expected),) and len(found.images) == count


def test_pictures_of_every_kind_become_rgb_with_white_behind(tmp_path: Path) -> None:
    clear = Pillow.new("RGBA", (4, 4), (200, 0, 0, 0))
    palette = Pillow.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    deep = Pillow.fromarray(np.full((4, 4), 32768, np.uint16))
    clear.save(tmp_path / "clear.png")
    for shown in (clear, palette, tmp_path / "clear.png", str(tmp_path / "clear.png")):
        assert as_image(shown).mode == "RGB" and set(as_image(shown).getdata()) == {(255, 255, 255)}
    assert set(as_image(deep).getdata()) == {(128, 128, 128)}
    assert as_image(Pillow.new("CMYK", (4, 4), (0, 0, 0, 255))).getpixel((0, 0)) == (0, 0, 0)
    with pytest.raises(ImageError, match=r"missing\.png: no such file"):
        as_image(tmp_path / "missing.png")


# -------------------------------------------------------------------------------------------------------- VLMEvalKit


class _BaseModel:
    """What ``vlmeval.vlm.base.BaseModel`` does with a message before the model sees it."""

    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]

    def __init__(self) -> None:
        self.dump_image_func = None

    def set_dump_image(self, dump_image_func: Any) -> None:
        self.dump_image_func = dump_image_func

    def preproc_content(self, inputs: Any) -> list[dict[str, Any]]:
        """A text, an item, or a list of either, to items; a text that names a file is one of the file's type."""
        if isinstance(inputs, str):
            return [{"type": "text", "value": inputs}]
        items = [inputs] if isinstance(inputs, dict) else list(inputs)
        if all(isinstance(item, str) for item in items):
            return [{"type": self.kind(item), "value": item} for item in items]
        assert all(item["type"] == self.kind(item["value"]) for item in items), f"Invalid input type: {items}"
        return items

    @staticmethod
    def kind(value: str) -> str:
        found = mimetypes.guess_type(value)[0] if Path(value).is_file() else None
        return found.partition("/")[0] if found else "text"

    def generate(self, message: Any, dataset: str | None = None) -> str:
        items = self.preproc_content(message)
        for item in items:
            assert item["type"] in self.allowed_types, f"Invalid input type: {item['type']}"
        return self.generate_inner(items, dataset)  # type: ignore[attr-defined]

    def chat(self, messages: list[dict[str, Any]], dataset: str | None = None) -> str:
        """Where the whole conversation fails, the oldest turns are dropped."""
        for message in messages:
            message["content"] = self.preproc_content(message["content"])
        while messages:
            try:
                return self.chat_inner(messages, dataset=dataset)  # type: ignore[attr-defined]
            except Exception:
                messages = messages[1:]
                while messages and messages[0]["role"] != "user":
                    messages = messages[1:]
        return "Chat Mode: Failed with all possible conversation turns."


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """VLMEvalKit's table of models."""
    stand_in(
        monkeypatch,
        "vlmeval",
        {
            "vlmeval.vlm": {},
            "vlmeval.vlm.base": {"BaseModel": _BaseModel},
            "vlmeval.config": {"supported_VLM": {}},
        },
    )
    vlmeval.model_class.cache_clear()
    yield importlib.import_module("vlmeval.config").supported_VLM
    vlmeval.model_class.cache_clear()


@pytest.fixture
def model(kit: dict[str, Any], nano_folder: Path, exact: Generator) -> Any:
    """The adapter as VLMEvalKit makes it from its table."""
    vlmeval.register(str(nano_folder), device="cpu", max_new_tokens=12)
    made = kit["pisces"]()
    made.generator = exact
    return made


def files(folder: Path, numbers: Sequence[int]) -> list[str]:
    paths = [folder / f"{number}.png" for number in numbers]
    for path, number in zip(paths, numbers, strict=True):
        picture(number).save(path)
    return [str(path) for path in paths]


def test_vlmevalkit_messages_are_answered_in_their_order(model: Any, exact: Generator, tmp_path: Path) -> None:
    one, two = files(tmp_path, [1, 2])
    mixed = [
        {"type": "text", "value": "This"},
        {"type": "image", "value": one},
        {"type": "image", "value": two},
        {"type": "text", "value": "Which?"},
        {"type": "text", "value": "A. first"},
    ]
    turn = Turn("user", ("This", 0, 1, "Which?\nA. first"))
    expected = exact.answer([(turn,)], [(picture(1), picture(2))], 12)[0]
    assert model.generate(mixed, dataset="toy") == expected
    assert model.generate([one, two, "Which?"]) == exact.text([[picture(1), picture(2)]], ["Which?"], 12)[0] != expected
    assert model.generate("Which?") == exact.text([[]], ["Which?"], 12)[0]
    assert (
        model.generate({"type": "image", "value": one}) == exact.answer([(Turn("user", (0,)),)], [(picture(1),)], 12)[0]
    )


def test_vlmevalkit_asks_in_the_words_of_its_datasets(model: Any) -> None:
    assert model.INTERLEAVE and not model.use_custom_prompt("MMBench_DEV_EN") and not model.is_api
    model.set_dump_image(print)
    assert isinstance(model, importlib.import_module("vlmeval.vlm.base").BaseModel)


def test_vlmevalkit_videos_are_refused_by_type(model: Any, tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"")
    with pytest.raises(AssertionError, match="Invalid input type: video"):
        model.generate([{"type": "video", "value": str(tmp_path / "film.mp4")}])


def test_a_vlmevalkit_chat_goes_on_and_drops_what_is_too_long(model: Any, exact: Generator, tmp_path: Path) -> None:
    (one,) = files(tmp_path, [1])
    asked = [{"type": "image", "value": one}, {"type": "text", "value": "What?"}]
    turns = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "a ball"},
        {"role": "user", "content": "Which colour?"},
    ]
    known = (Turn("user", (0, "What?")), Turn("assistant", ("a ball",)), Turn("user", ("Which colour?",)))
    assert model.chat(copy.deepcopy(turns)) == exact.answer([known], [(picture(1),)], 12)[0]
    turns[0]["content"] = "x" * 2000
    assert model.chat(turns) == exact.text([[]], ["Which colour?"], 12)[0]


def test_the_vlmevalkit_adapter_needs_vlmevalkit_only_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base"):
        monkeypatch.setitem(sys.modules, name, None)
    vlmeval.model_class.cache_clear()
    with pytest.raises(ImportError, match="vlmeval"):
        vlmeval.register()
    assert len(Path(str(vlmeval.__file__)).read_text().splitlines()) < 60  # what the issue asks for


# ------------------------------------------------------------------------------------------- the local harness tasks


def test_the_local_tasks_ask_about_packaged_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "harness"))
    task, scenes = importlib.import_module("scene_task"), ShardReader(data_path("fixture/pairs"))
    rows = [json.loads(line) for line in (ROOT / "tests" / "harness" / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == 48
    for doc in rows:
        known = {(asked.question, asked.answer) for asked in scenes[doc["scene"]].questions}
        assert (doc["question"], doc["answer"]) in known and doc["choices"][task.gold(doc)] == doc["answer"]
    first = read_messages(task.messages(rows[0]))
    assert [turn.role for turn in first.turns] == ["user", "assistant", "user"] and len(first.images) == 2
    assert task.right(rows[0], [" Blue "]) == {"exact_match": 1.0} and task.right(rows[0], ["red"])["exact_match"] == 0
