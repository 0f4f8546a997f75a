"""What the server writes: the bodies and streamed events of OpenAI's API."""

from __future__ import annotations

import base64
import json
import time
import uuid
from typing import Any

Message = dict[str, Any]


def new_id(prefix: str) -> str:
    """An identifier, such as ``chatcmpl-6f1...``."""
    return f"{prefix}-{uuid.uuid4().hex[:24]}"


def data_url(raw: bytes) -> str:
    """A picture's file as an address."""
    return f"data:image/png;base64,{base64.b64encode(raw).decode()}"


def sse(body: Message, event: str | None = None) -> str:
    """One server-sent event."""
    named = f"event: {event}\n" if event else ""
    return f"{named}data: {json.dumps(body)}\n\n"


def usage_of(done: Message) -> Message:
    """Token counts of a finished request."""
    return {
        "prompt_tokens": done["prompt"],
        "completion_tokens": done["new"],
        "total_tokens": done["prompt"] + done["new"],
        "prompt_tokens_details": {"cached_tokens": done["known"]},
    }


def picture_parts(files: list[bytes]) -> list[Message]:
    """Pictures as parts of a message's content."""
    return [{"type": "image_url", "image_url": {"url": data_url(raw)}} for raw in files]


class ChatAnswer:
    """One chat completion, whole or in pieces.

    A picture stands both in ``content``, as vLLM-Omni writes it, and in ``images``, as OpenRouter does.
    """

    def __init__(self, model: str) -> None:
        self.head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model}

    def whole(self, text: str, files: list[bytes], done: Message) -> Message:
        """The body of a completion."""
        message: Message = {"role": "assistant", "content": text, "refusal": None}
        if files:
            message |= {"content": picture_parts(files), "images": picture_parts(files)}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": done["finish_reason"]}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": usage_of(done)}

    def piece(self, delta: Message, reason: str | None = None, **more: Any) -> str:
        """A piece of a streamed completion."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return sse({**self.head, "object": "chat.completion.chunk", "choices": [choice], **more})

    def picture(self, raw: bytes, index: int) -> str:
        """A streamed picture."""
        parts = [{**part, "index": index} for part in picture_parts([raw])]
        return self.piece({"content": picture_parts([raw]), "images": parts})

    def preview(self, raw: bytes, index: int) -> str:
        """A streamed picture that is not finished; ours."""
        return self.piece({"partial_image": {**picture_parts([raw])[0], "index": index}})

    def usage(self, done: Message) -> str:
        """The piece with token counts, which has no choice."""
        body = {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage_of(done)}
        return sse(body)


def images_usage(done: Message) -> Message:
    """Token counts in the form of the images API."""
    return {
        "input_tokens": done["prompt"],
        "output_tokens": done["new"],
        "total_tokens": done["prompt"] + done["new"],
        "input_tokens_details": {"text_tokens": done["prompt"], "image_tokens": 0},
    }


def image_event(kind: str, raw: bytes, size: int, how: str, **more: Any) -> str:
    """A streamed picture of the images API: ``image_generation.partial_image``, ``image_edit.completed``, ..."""
    body: Message = {"type": kind, "b64_json": base64.b64encode(raw).decode()}
    body |= {"created_at": int(time.time()), "size": f"{size}x{size}", "output_format": how}
    body |= {"quality": "auto", "background": "opaque", **more}
    return sse(body, body["type"])
