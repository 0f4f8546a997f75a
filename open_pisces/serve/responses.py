"""``POST /v1/responses``: answers and pictures through OpenAI's Responses API and its ``image_generation`` tool."""

from __future__ import annotations

import base64
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from open_pisces.serve.answers import Message, data_url, new_id, sse
from open_pisces.serve.errors import ApiError
from open_pisces.serve.schemas import ChatMessage, Drawing, Part, ResponsesRequest

REMEMBERED = 200
"""Conversations that can be gone on with by ``previous_response_id``; the oldest is forgotten first."""
MOST_BYTES = 256 << 20
"""Of all that is remembered, pictures mostly."""


class Conversations:
    """What was said, by the id of its last answer. In memory: a server that restarts has forgotten it."""

    def __init__(self) -> None:
        self.kept: OrderedDict[str, list[ChatMessage]] = OrderedDict()
        self.sizes: dict[str, int] = {}

    def messages(self, asked: ResponsesRequest) -> list[ChatMessage]:
        """The whole conversation that a request goes on with.

        Raises:
            ApiError: for an answer that is not remembered.
        """
        earlier: list[ChatMessage] = []
        if asked.previous_response_id is not None:
            if asked.previous_response_id not in self.kept:
                message = f"no response {asked.previous_response_id!r} is remembered: send the whole conversation"
                raise ApiError(404, message, "previous_response_id", "previous_response_not_found")
            earlier = self.kept[asked.previous_response_id]
        items = [ChatMessage(role="user", content=asked.input)] if isinstance(asked.input, str) else asked.input
        return [*earlier, *(_message(item) for item in items)]

    def keep(self, id: str, messages: list[ChatMessage], text: str, files: list[bytes]) -> None:
        """Remember a conversation and its answer."""
        drawn = [_picture(data_url(raw)) for raw in files]
        content: Any = drawn or text
        self.kept[id] = [*messages, ChatMessage(role="assistant", content=content)]
        self.sizes[id] = sum(len(message.model_dump_json()) for message in self.kept[id])
        while len(self.kept) > REMEMBERED or sum(self.sizes.values()) > MOST_BYTES:
            oldest, _ = self.kept.popitem(last=False)
            del self.sizes[oldest]


def _message(item: ChatMessage | Drawing) -> ChatMessage:
    if isinstance(item, Drawing):
        return ChatMessage(role="assistant", content=[_picture("data:image/png;base64," + item.result)])
    return item


def _picture(url: str) -> Part:
    return Part(type="image_url", image_url=url)


class Response:
    """One response, whole or as events.

    Args:
        model: its name.
        asked: the request.
        messages: the conversation, which is remembered with the answer.
        kept: where.
    """

    def __init__(self, model: str, asked: ResponsesRequest, messages: list[ChatMessage], kept: Conversations) -> None:
        self.asked = asked
        self.messages = messages
        self.kept = kept
        self.id = new_id("resp")
        self.head = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "metadata": {},
            "parallel_tool_calls": False,
            "previous_response_id": asked.previous_response_id,
            "tool_choice": asked.tool_choice,
            "tools": [tool.model_dump(exclude_none=True) for tool in asked.tools],
            "temperature": asked.temperature,
            "top_p": asked.top_p,
        }
        self.number = -1
        self.item: Message | None = None
        self.previews = 0
        self.text = ""
        self.files: list[bytes] = []

    def body(self, status: str, done: Message | None = None) -> Message:
        """The response as it stands."""
        found = {**self.head, "status": status, "output": [self.item] if self.item else [], "usage": None}
        if done is not None:
            found["usage"] = {
                "input_tokens": done["prompt"],
                "input_tokens_details": {"cached_tokens": done["known"]},
                "output_tokens": done["new"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": done["prompt"] + done["new"],
            }
            if done["finish_reason"] == "length":
                found |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        return found

    async def whole(self, events: Any) -> Message:
        """The body at the end."""
        async with aclosing(events):
            async for message, blobs in events:
                self._take(message, blobs)
        return self._finished(message)

    def _take(self, message: Message, blobs: list[bytes]) -> None:
        if message["kind"] == "text":
            self.text += message["text"]
        elif message["kind"] == "picture":
            self.files += blobs

    def _finished(self, done: Message) -> Message:
        self.kept.keep(self.id, self.messages, self.text, self.files)
        self.item = self._drawn("completed") if self.files else self._said("completed")
        return self.body("completed", done)

    def _said(self, status: str) -> Message:
        item = self.item or {"type": "message", "id": new_id("msg"), "role": "assistant"}
        part = {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}
        return {**item, "status": status, "content": [part] if status == "completed" else []}

    def _drawn(self, status: str) -> Message:
        item = self.item or {"type": "image_generation_call", "id": new_id("ig")}
        result = base64.b64encode(self.files[0]).decode() if self.files else None
        return {**item, "status": status, "result": result}

    # ---------------------------------------------------------------------------------------------- as events

    async def pieces(self, events: Any) -> AsyncIterator[str]:
        """The events of a streamed response."""
        yield self._event("response.created", response=self.body("in_progress"))
        yield self._event("response.in_progress", response=self.body("in_progress"))
        async for message, blobs in events:
            kind = message["kind"]
            self._take(message, blobs)
            if kind in ("vectors", "step", "text") and self.item is None:
                for piece in self._opened(kind != "text"):
                    yield piece
            if kind == "text":
                yield self._part_event("response.output_text.delta", delta=message["text"], logprobs=[])
            elif kind == "preview":
                shown = base64.b64encode(blobs[0]).decode()
                more = {"partial_image_b64": shown, "partial_image_index": self.previews}
                self.previews += 1
                yield self._item_event("response.image_generation_call.partial_image", **more)
            elif kind == "done":
                if self.item is None:  # an answer without a word
                    for piece in self._opened(False):
                        yield piece
                for piece in self._closed(message):
                    yield piece

    def _opened(self, drawing: bool) -> list[str]:
        """What is told when it is known what comes."""
        self.item = self._drawn("in_progress") if drawing else self._said("in_progress")
        found = [self._event("response.output_item.added", output_index=0, item=self.item)]
        if drawing:
            found += [self._item_event(f"response.image_generation_call.{at}") for at in ("in_progress", "generating")]
        else:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            found.append(self._part_event("response.content_part.added", part=part))
        return found

    def _closed(self, done: Message) -> list[str]:
        """What is told at the end."""
        body = self._finished(done)
        assert self.item is not None
        if self.files:
            found = [self._item_event("response.image_generation_call.completed")]
        else:
            found = [self._part_event("response.output_text.done", text=self.text, logprobs=[])]
            found.append(self._part_event("response.content_part.done", part=self.item["content"][0]))
        found.append(self._event("response.output_item.done", output_index=0, item=self.item))
        return [*found, self._event(f"response.{body['status']}", response=body)]

    def _event(self, kind: str, **more: Any) -> str:
        self.number += 1
        return sse({"type": kind, "sequence_number": self.number, **more}, kind)

    def _item_event(self, kind: str, **more: Any) -> str:
        assert self.item is not None
        return self._event(kind, output_index=0, item_id=self.item["id"], **more)

    def _part_event(self, kind: str, **more: Any) -> str:
        return self._item_event(kind, content_index=0, **more)
