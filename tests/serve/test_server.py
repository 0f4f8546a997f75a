"""The server as clients meet it: OpenAI's own SDK, Open WebUI's requests, raw HTTP, faults."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image as Pillow
from servers import Server, running

from open_pisces.generate.generator import Generator
from open_pisces.model.folder import WEIGHTS

KEY = "sesame"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The shipped model, without a key."""
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator.from_pretrained(WEIGHTS, "cpu")


@pytest.fixture(scope="module")
def heart(generator: Generator) -> str:
    """A picture of a red heart, as a data URL."""
    file = io.BytesIO()
    generator.image(["a red heart on a blue background"])[0][0].save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Pillow.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def about(heart: str, words: str) -> list[Any]:
    """A conversation about a picture."""
    return [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": heart}}, {"type": "text", "text": words}],
        }
    ]


# ------------------------------------------------------------------------------------------------- OpenAI's own SDK


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["pisces"]
    assert client.models.retrieve("pisces").owned_by == "open_pisces"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.models.retrieve("gpt")


def test_a_question_about_a_picture(client: openai.OpenAI, heart: str) -> None:
    found = client.chat.completions.create(model="pisces", messages=about(heart, "What is in the picture?"), user="me")
    assert found.choices[0].message.content == "red heart" and found.choices[0].finish_reason == "stop"
    assert found.choices[0].message.role == "assistant" and found.object == "chat.completion"
    assert found.usage and found.usage.completion_tokens == 3
    assert found.usage.total_tokens == found.usage.prompt_tokens + 3 > 64


def test_a_streamed_answer_is_the_same_in_pieces(client: openai.OpenAI, heart: str) -> None:
    asked = {"model": "pisces", "messages": about(heart, "Describe the image in detail.")}
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content and len(pieces) > 5
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-2].choices[0].finish_reason == "stop"
    assert pieces[-1].choices == [] and pieces[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({piece.id for piece in pieces}) == 1


def test_a_streamed_answer_without_usage_ends_with_its_reason(client: openai.OpenAI, heart: str) -> None:
    pieces = list(client.chat.completions.create(model="pisces", messages=about(heart, "What is it?"), stream=True))
    assert all(piece.choices for piece in pieces) and pieces[-1].choices[0].finish_reason == "stop"


def test_settings_of_an_answer(client: openai.OpenAI, heart: str) -> None:
    asked = {"model": "pisces", "messages": about(heart, "Describe the image in detail.")}
    cut = client.chat.completions.create(**asked, max_tokens=2)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stopped = client.chat.completions.create(**asked, stop=whole[8:14])
    assert stopped.choices[0].message.content == whole[: whole.find(whole[8:14])]
    drawn = [client.chat.completions.create(**asked, temperature=2.0, top_p=0.9, seed=i) for i in (1, 1, 2, 3)]
    texts = [one.choices[0].message.content for one in drawn]
    assert texts[0] == texts[1] and len(set(texts)) > 1


def test_a_picture_in_a_chat_answer_stands_in_both_places(client: openai.OpenAI) -> None:
    asked = {"model": "pisces", "messages": [{"role": "user", "content": "Draw a red heart."}]}
    for modalities in (["image"], ["text", "image"], ["image", "text"]):
        found = client.chat.completions.create(**asked, modalities=modalities, extra_body={"seed": 3, "steps": 2})
        message = found.choices[0].message.model_dump()
        assert message["content"] == message["images"] and message["content"][0]["type"] == "image_url"
        assert pixels(message["images"][0]["image_url"]["url"].partition(",")[2]).shape == (64, 64, 3)
    pieces = list(
        client.chat.completions.create(**asked, modalities=["image"], stream=True, extra_body={"steps": 2, "seed": 3})
    )
    shown = [piece.choices[0].delta.model_dump().get("images") for piece in pieces if piece.choices]
    assert [one[0]["image_url"]["url"] for one in shown if one] == [message["images"][0]["image_url"]["url"]]


def test_a_conversation_goes_on_about_the_picture_that_was_drawn(client: openai.OpenAI, heart: str) -> None:
    first = {"role": "user", "content": "a red heart on a blue background"}
    drawn = client.chat.completions.create(model="pisces", messages=[first], modalities=["image"])
    answer = drawn.choices[0].message.model_dump()
    forms = [
        {"role": "assistant", "content": answer["content"]},
        {"role": "assistant", "content": "", "images": answer["images"]},
    ]
    asked = {"role": "user", "content": "What color is the background?"}
    for form in forms:
        found = client.chat.completions.create(model="pisces", messages=[first, form, asked])
        assert "blue" in found.choices[0].message.content


def test_pictures(client: openai.OpenAI, generator: Generator) -> None:
    found = client.images.generate(
        model="pisces", prompt="a yellow star", n=2, extra_body={"seed": 5, "num_inference_steps": 3}
    )
    expected = generator.image(["a yellow star"], 2, steps=3, seed=5)[0]
    for one, other in zip(found.data, expected, strict=True):
        assert np.abs(pixels(one.b64_json).astype(int) - np.asarray(other)).max() <= 1
    assert found.usage.output_tokens == generator.renderer.M + 1 and found.size == "64x64"


def test_a_picture_is_the_same_alone_and_with_others_to_the_bit(client: openai.OpenAI) -> None:
    """Eight at once; each again alone."""
    prompts = [
        f"{count} {color} {thing}"
        for count, color in (("two", "red"), ("a", "blue"))
        for thing in ("cat", "tree", "star", "car")
    ]
    found: dict[str, str] = {}

    def draw(prompt: str) -> None:
        more = {"seed": len(prompt), "steps": 3}
        found[prompt] = client.images.generate(model="pisces", prompt=prompt, extra_body=more).data[0].b64_json

    threads = [threading.Thread(target=draw, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(found)
    for prompt in prompts:
        draw(prompt)
    assert found == together and len(set(found.values())) == 8


def test_a_streamed_picture_shows_previews(client: openai.OpenAI) -> None:
    asked = {"model": "pisces", "prompt": "a red heart", "n": 2, "extra_body": {"steps": 4}}
    events = list(client.images.generate(**asked, stream=True, partial_images=2))
    kinds = [event.type.partition(".")[2] for event in events]
    assert kinds == ["partial_image"] * 4 + ["completed"] * 2
    assert sorted(event.partial_image_index for event in events[:4]) == [0, 0, 1, 1]
    whole = client.images.generate(**asked).data
    assert [event.b64_json for event in events[4:]] == [one.b64_json for one in whole]
    assert pixels(events[0].b64_json).shape == (64, 64, 3) and events[-1].usage.total_tokens > 0


@pytest.mark.parametrize(("kind", "begin"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")])
def test_sizes_and_formats(client: openai.OpenAI, kind: str, begin: bytes) -> None:
    more = {"steps": 1}
    found = client.images.generate(
        model="pisces", prompt="a tree", size="512x512", output_format=kind, response_format="b64_json", extra_body=more
    )
    assert base64.b64decode(found.data[0].b64_json).startswith(begin)
    assert pixels(found.data[0].b64_json).shape == (512, 512, 3) and found.size == "512x512"


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "a", "n": 11}, "n: "),
        ({"prompt": "a", "size": "64x128"}, "size '64x128'.*draws squares of 64x64"),
        ({"prompt": "a", "size": "9999x9999"}, "squares of 16 to 2048"),
        ({"prompt": "a", "size": "big"}, "size: "),
        ({"prompt": "a", "response_format": "url"}, "response_format: "),
        ({"prompt": "a", "model": "dall-e-3"}, "no model 'dall-e-3'"),
        ({"prompt": "a", "background": "transparent"}, "background is not served here"),
        ({"prompt": "a", "extra_body": {"negative_prompt": "b"}}, "negative_prompt: unknown field"),
        ({"prompt": "a", "extra_body": {"seed": -1}}, "seed: "),
        ({"prompt": "word " * 2000}, "takes .* tokens"),
    ],
)
def test_what_cannot_be_drawn_is_said(client: openai.OpenAI, asked: dict[str, Any], why: str) -> None:
    with pytest.raises(openai.APIStatusError, match=why) as found:
        client.images.generate(**{"model": "pisces", **asked})
    assert found.value.status_code in (400, 404)
    assert set(found.value.body) == {"message", "type", "param", "code"}


PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "system", "content": "a"}]}, "last message must be the user's"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "last message must be the user's"),
        ({"messages": [{"role": "user", "content": ""}]}, "say something"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, r"messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "lacks its 'image_url'"),
        ({"messages": [{"role": "user", "content": [PART]}]}, "neither a PNG nor a JPEG nor a WebP"),
        ({"messages": [{"role": "system", "content": [PART]}, {"role": "user", "content": "a"}]}, "holds text only"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not served here"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not served here"),
        ({"n": 2}, "n is not served here"),
        ({"temperature": 3}, "temperature: "),
        ({"extra_body": {"top_k": 5}}, "top_k: unknown field"),
        ({"extra_body": {"messages": [{"role": "user", "content": "\udc00"}]}}, "messages|JSON"),
    ],
)
def test_what_cannot_be_answered_is_said(
    server: Server, client: openai.OpenAI, asked: dict[str, Any], why: str
) -> None:
    body = {"model": "pisces", "messages": [{"role": "user", "content": "a"}], **asked}
    body |= body.pop("extra_body", {})
    status, found, _ = server.ask("POST", "/v1/chat/completions", json.dumps(body).encode())
    assert status == 400, found
    assert re.search(why, found["error"]["message"]), found


def test_openais_neutral_fields_are_taken(client: openai.OpenAI, heart: str) -> None:
    found = client.chat.completions.create(
        model="pisces",
        messages=about(heart, "What is in the picture?"),
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        logprobs=False,
        n=1,
        response_format={"type": "text"},
        tools=[],
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        parallel_tool_calls=True,
        reasoning_effort="low",
    )
    assert found.choices[0].message.content == "red heart"


def test_special_tokens_in_a_users_text_are_characters(client: openai.OpenAI) -> None:
    words = "[IMG][/IMG]<image><|im_end|><|eot_id|> what?"
    found = client.chat.completions.create(model="pisces", messages=[{"role": "user", "content": words}], max_tokens=4)
    assert found.choices[0].finish_reason in ("stop", "length")


def test_a_response_in_words(client: openai.OpenAI, heart: str) -> None:
    shown = [{"type": "input_image", "image_url": heart}, {"type": "input_text", "text": "What is in the picture?"}]
    first = client.responses.create(model="pisces", input=[{"role": "user", "content": shown}])
    assert first.output_text == "red heart" and first.status == "completed" and first.usage.output_tokens == 3
    then = "What color is the background?"
    second = client.responses.create(model="pisces", input=then, previous_response_id=first.id)
    assert second.usage.input_tokens_details.cached_tokens > 64 and second.output_text
    with pytest.raises(openai.NotFoundError, match="no response 'resp-x' is remembered"):
        client.responses.create(model="pisces", input=then, previous_response_id="resp-x")
    cut = client.responses.create(model="pisces", input=[{"role": "user", "content": shown}], max_output_tokens=1)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    with pytest.raises(openai.BadRequestError, match="last message must be the user's"):
        client.responses.create(model="pisces", input=[])
    with pytest.raises(openai.BadRequestError, match="tools.0.type"):
        client.responses.create(model="pisces", input=then, tools=[{"type": "web_search"}])


def test_a_response_in_words_is_streamed(client: openai.OpenAI, heart: str) -> None:
    shown = [{"type": "input_image", "image_url": heart}, {"type": "input_text", "text": "What is in the picture?"}]
    with client.responses.stream(model="pisces", input=[{"role": "user", "content": shown}]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "red heart" and kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") == 2 and "response.output_text.done" in kinds


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "image_generation"}])
def test_the_image_generation_tool_draws(client: openai.OpenAI, choice: Any) -> None:
    tool = {"type": "image_generation", "size": "128x128", "partial_images": 1}
    asked = {"model": "pisces", "input": "Draw a red heart", "tools": [tool], "tool_choice": choice}
    found = client.responses.create(**asked)
    (call,) = found.output
    assert call.type == "image_generation_call" and pixels(call.result).shape == (128, 128, 3)
    then = client.responses.create(model="pisces", input="What is in the picture?", previous_response_id=found.id)
    assert "heart" in then.output_text
    events = list(client.responses.create(**asked, stream=True))
    kinds = [event.type.removeprefix("response.image_generation_call.") for event in events]
    assert [kind for kind in kinds if "." not in kind] == ["in_progress", "generating", "partial_image", "completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output[0].result == call.result
    words = client.responses.create(**{**asked, "tool_choice": "none"})
    assert words.output[0].type == "message"


# ------------------------------------------------------------------------------------------ Open WebUI, raw HTTP


def test_open_webuis_requests(server: Server) -> None:
    """Open WebUI 0.12: models, chat with usage, pictures (``routers/openai.py``, ``routers/images.py``)."""
    bearer = {"Authorization": "Bearer sk-none"}
    assert server.ask("GET", "/v1/models", **bearer)[1]["data"][0]["id"] == "pisces"
    chat = {
        "stream": True,
        "model": "pisces",
        "messages": [{"role": "user", "content": "a"}],
        "stream_options": {"include_usage": True},
    }
    status, text, headers = server.ask("POST", "/v1/chat/completions", chat, **bearer)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert text.endswith("data: [DONE]\n\n") and all(line.startswith("data: ") for line in text.split("\n\n") if line)
    drawing = {"model": "pisces", "prompt": "a cat", "n": 1, "size": "512x512", "response_format": "b64_json"}
    status, found, _ = server.ask("POST", "/v1/images/generations", drawing, **bearer)
    assert status == 200 and pixels(found["data"][0]["b64_json"]).shape == (512, 512, 3)


def test_bodies_that_are_no_requests(server: Server) -> None:
    path = "/v1/chat/completions"
    for body in (b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": NaN}', b"1", b'"a"', b"{}"):
        status, found, _ = server.ask("POST", path, body)
        assert status == 400 and found["error"]["type"] == "invalid_request_error", (body, found)
    status, found, _ = server.ask("POST", path, b"a=b", content_type="application/x-www-form-urlencoded")
    assert status == 400
    assert server.ask("GET", path)[0] == 405 and server.ask("GET", "/v2")[0] == 404
    assert server.ask("GET", "/v2")[1]["error"]["message"] == "no route /v2"
    assert server.ask("GET", "/docs")[0] == server.ask("GET", "/openapi.json")[0] == 404
    assert server.ask("POST", path, b"{}", origin="https://evil.example")[0] == 403
    assert server.ask("GET", "/v1/models", host="evil.example")[0] == 400


def test_a_body_that_is_too_large_is_refused_with_and_without_a_length(server: Server) -> None:
    status, found, _ = server.ask("POST", "/v1/chat/completions", b"{}", content_length=str(10**9))
    assert status == 413 and found["error"]["code"] == "request_too_large"
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    piece = b" " * (1 << 20)
    try:
        connection.request(
            "POST",
            "/v1/chat/completions",
            iter([piece] * 40),
            {"content-type": "application/json"},
            encode_chunked=True,
        )
        answer = connection.getresponse()
        assert answer.status == 413 and json.loads(answer.read())["error"]["code"] == "request_too_large"
    except (BrokenPipeError, ConnectionResetError):
        pass  # it hung up in the middle, which is as good
    assert server.ask("GET", "/health")[0] == 200


def test_health_and_metrics(server: Server, client: openai.OpenAI) -> None:
    before = server.metric("pisces_pictures_total")
    client.images.generate(model="pisces", prompt="a cat", n=3, extra_body={"steps": 1})
    assert server.metric("pisces_pictures_total") == before + 3
    assert server.metric("pisces_requests_in_flight") == 0 and server.metric("pisces_worker_ready") == 1
    text = server.ask("GET", "/metrics")[1]
    assert 'pisces_http_answers_total{route="/v1/images/generations",status="200"}' in text
    assert "/v2" not in text


def test_hostile_pictures_cost_their_own_request(server: Server, heart: str) -> None:
    bomb = io.BytesIO()
    Pillow.new("1", (30_000, 30_000)).save(bomb, "PNG")
    good = base64.b64decode(heart.partition(",")[2])
    files = {
        "pixels": bomb.getvalue(),
        "picture": good[: len(good) // 2],
        "neither a PNG": b"GIF89a" + good,
        "cannot|picture": b"\x89PNG\r\n\x1a\n" + os.urandom(200),
    }
    for why, raw in files.items():
        url = "data:image/png;base64," + base64.b64encode(raw).decode()
        status, found, _ = server.ask("POST", "/v1/chat/completions", {"messages": about(url, "What is it?")})
        assert status == 400 and found["error"]["code"] == "invalid_image", found
        assert re.search(why, found["error"]["message"])
    status, found, _ = server.ask("POST", "/v1/chat/completions", {"messages": about("http://127.0.0.1/a.png", "?")})
    assert status == 400 and "fetches nothing" in found["error"]["message"]


# ------------------------------------------------------------------------------------------------------ faults, limits


def slow(server: Server, steps: int = 200, **more: Any) -> http.client.HTTPConnection:
    """A request that takes long, begun and not waited for."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps({"prompt": "a cat", "n": 4, "steps": steps, **more})
    connection.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
    return connection


def wait_until(condition: Any, seconds: float = 60) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(server: Server, stream: bool) -> None:
    connection = slow(server, stream=stream)
    wait_until(lambda: server.metric("pisces_requests_in_flight") == 1)
    time.sleep(0.3)
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    began = time.monotonic()
    wait_until(lambda: server.metric("pisces_requests_in_flight") == 0)
    server.ask("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1})
    assert time.monotonic() - began < 20  # 800 steps would take a minute or more


def test_too_many_requests_are_sent_away_and_the_drain_finishes_what_was_begun() -> None:
    with running("--max-queue", "2", PISCES_API_KEY=KEY) as server:
        bearer = {"authorization": f"Bearer {KEY}"}
        assert server.ask("GET", "/v1/models")[0] == 401 and server.ask("GET", "/health")[0] == 200
        found: list[int] = []

        def draw() -> None:
            body = {"prompt": "a cat", "n": 4, "steps": 30}
            found.append(server.ask("POST", "/v1/images/generations", body, **bearer)[0])

        threads = [threading.Thread(target=draw) for _ in range(2)]
        for thread in threads:
            thread.start()
        metrics = lambda: server.ask("GET", "/metrics", **bearer)[1]  # noqa: E731
        wait_until(lambda: "pisces_requests_in_flight 2.0" in metrics())
        status, refused, headers = server.ask("POST", "/v1/images/generations", {"prompt": "a"}, **bearer)
        assert status == 429 and refused["error"]["code"] == "queue_full" and int(headers["retry-after"]) >= 1
        code, errors = server.stop()
        for thread in threads:
            thread.join()
        assert found == [200, 200] and code == 0, errors
        assert "Traceback" not in errors


def test_a_worker_that_dies_is_replaced_and_its_requests_are_told() -> None:
    with running() as server:
        for _ in range(2):
            connection = slow(server)
            wait_until(lambda: server.metric("pisces_requests_in_flight") == 1)
            (worker,) = server.children()
            os.kill(worker, signal.SIGKILL)
            began = time.monotonic()
            answer = connection.getresponse()
            told = json.loads(answer.read())
            assert answer.status == 503 and "has died" in told["error"]["message"]
            assert time.monotonic() - began < 20  # the seconds are proven in tests/prove
            server.wait_for(503, 10)
            status, refused, headers = server.ask("POST", "/v1/images/generations", {"prompt": "a"})
            assert status == 503 and "retry-after" in headers and refused["error"]["type"] == "service_unavailable"
            server.wait_for(200, 60)
        assert server.ask("POST", "/v1/images/generations", {"prompt": "a cat", "steps": 1})[0] == 200
        assert server.metric("pisces_worker_restarts") == 2


def test_a_worker_that_hangs_is_replaced() -> None:
    with running("--patience", "2") as server:
        connection = slow(server)
        wait_until(lambda: server.metric("pisces_requests_in_flight") == 1)
        (worker,) = server.children()
        os.kill(worker, signal.SIGSTOP)
        answer = connection.getresponse()
        assert answer.status == 503
        server.wait_for(200, 60)


def test_a_worker_whose_server_was_killed_ends() -> None:
    with running() as server:
        (worker,) = server.children()
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not Path(f"/proc/{worker}").exists() or " Z " in Path(f"/proc/{worker}/stat").read_text())


def test_a_model_that_was_trained_to_draws_again_from_a_picture(nano_folder: Path, tmp_path: Path, heart: str) -> None:
    folder = Path(shutil.copytree(nano_folder, tmp_path / "model"))
    card = json.loads((folder / "config.json").read_text())
    card["record"].append({"name": "a", "tasks": ["generate_short", "reconstruct"]})
    (folder / "config.json").write_text(json.dumps(card))
    raw = base64.b64decode(heart.partition(",")[2])
    with running("--model", str(folder), "--served-name", "nano") as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        more = {"seed": 2, "steps": 2}
        asked = {
            "model": "nano",
            "image": [("a.png", raw)],
            "prompt": "Draw the image again.",
            "n": 2,
            "extra_body": more,
        }
        found = client.images.edit(**asked)
        assert len(found.data) == 2 and pixels(found.data[0].b64_json).shape == (32, 32, 3)
        other = client.images.edit(**{**asked, "image": ("a.png", rotated(raw))})
        assert other.data[0].b64_json != found.data[0].b64_json
        events = list(client.images.edit(**asked, stream=True, partial_images=1))
        assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"] * 2
        assert [event.b64_json for event in events[2:]] == [one.b64_json for one in found.data]
        with pytest.raises(openai.BadRequestError, match="neither a PNG"):
            client.images.edit(**{**asked, "image": ("a.png", b"GIF")})
        with pytest.raises(openai.BadRequestError, match="n: "):
            client.images.edit(**{**asked, "n": 0})


def test_a_model_that_was_not_trained_to_draw_again_says_so(nano_folder: Path, heart: str) -> None:
    raw = base64.b64decode(heart.partition(",")[2])
    with running("--model", str(nano_folder), "--served-name", "nano") as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="not trained to draw from a picture"):
            client.images.edit(model="nano", image=("heart.png", raw), prompt="Draw the image again.")
        with pytest.raises(openai.BadRequestError, match="mask: only pictures"):
            client.images.edit(model="nano", image=("heart.png", raw), mask=("mask.png", raw), prompt="a")


def test_the_shipped_model_draws_again_from_a_picture(client: openai.OpenAI, heart: str) -> None:
    raw = base64.b64decode(heart.partition(",")[2])
    found = client.images.edit(model="pisces", image=("heart.png", raw), prompt="Draw the image again.")
    drawn = pixels(found.data[0].b64_json).astype(int)
    red, green = drawn[24:40, 24:40, 0].mean(), drawn[24:40, 24:40, 1].mean()
    assert red > green + 60  # the middle of a red heart


def rotated(raw: bytes) -> bytes:
    file = io.BytesIO()
    Pillow.open(io.BytesIO(raw)).rotate(90).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--host", "0.0.0.0"], "lets anyone in who reaches this machine: set a key"),
        (["--model", "nowhere"], "no model folder at nowhere"),
        (["--api-key-file", "nowhere"], "the keys in nowhere cannot be read"),
        (["--host", "192.0.2.1", "--api-key-file", "keys"], "cannot listen on 192.0.2.1 port 0"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_a_line(tmp_path: Path, arguments: list[str], why: str) -> None:
    (tmp_path / "keys").write_text("a\n\nb\n")
    command = [sys.executable, "-m", "open_pisces", "serve", "--port", "0", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_port_that_is_taken_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "open_pisces", "serve", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "cannot listen on 127.0.0.1" in done.stderr
