"""What clients send: OpenAI's chat and images requests, with the settings of our decoder beside them.

A field that is not known is refused by name: a setting that is silently left out is worse than an error. Fields of
OpenAI's that mean nothing here are taken where their value asks for nothing (`NEUTRAL`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MOST_TEXT = 100_000
MOST_PICTURES = 10
Text = Annotated[str, StringConstraints(max_length=MOST_TEXT)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Scale = Annotated[float, Field(ge=0, le=100)]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "n": (1,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "background": ("auto", "opaque", False),
    "truncation": ("disabled", "auto"),
    "text": ({"format": {"type": "text"}}, {}),
    "include": ([],),
    "style": ("vivid", "natural"),
    "moderation": ("auto", "low"),
    "input_fidelity": ("low", "high"),
}
"""Fields of OpenAI's that are not served, with the values that ask for nothing; null always does."""
MEANINGLESS = {
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
    "reasoning_effort", "verbosity", "reasoning", "prompt_cache_retention", "conversation_id", "chat_id",
}  # fmt: skip
"""Fields that change nothing of an answer's meaning; any value is taken."""


class Strict(BaseModel):
    """A request or a part of one: unknown fields are refused, numbers are finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Body(Strict):
    """A whole request."""

    model: Annotated[str, StringConstraints(max_length=200)] | None = None

    @model_validator(mode="before")
    @classmethod
    def without_neutral_fields(cls, found: Any) -> Any:
        """Leave out fields that ask for nothing; those that do ask are told to be unknown, or not served."""
        if not isinstance(found, dict):
            return found
        kept = {}
        for name, value in found.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in MEANINGLESS or value is None or value in NEUTRAL.get(name, ()):
                continue
            elif name in NEUTRAL:
                raise ValueError(f"{name} is not served here: leave it out")
            else:
                kept[name] = value
        return kept


class Drawn(Strict):
    """Settings of a drawing, beside those of OpenAI."""

    steps: Annotated[int, Field(ge=1, le=200)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=200)] | None = None
    guidance_scale: Scale | None = None
    vector_guidance: Scale | None = None
    seed: Seed | None = None
    size: Annotated[str, StringConstraints(pattern=r"^(auto|\d{1,5}x\d{1,5})$")] | None = None

    def drawing(self) -> dict[str, Any]:
        """What the engine is asked for; what was left out is the model's own."""
        steps = self.steps if self.num_inference_steps is None else self.num_inference_steps
        named = {"steps": steps, "guidance_scale": self.guidance_scale, "vector_guidance": self.vector_guidance}
        return {name: value for name, value in named.items() if value is not None}


class ImageUrl(Strict):
    """Where a picture is: a data URL, or an address on the server's allow-list."""

    url: Annotated[str, StringConstraints(max_length=64 << 20)]
    detail: Literal["auto", "low", "high", "original"] | None = None


def preset_of(quality: str | None) -> dict[str, str]:
    """OpenAI's ``quality`` as one of our presets; nothing for the model's own settings."""
    named = {"low": "fast", "medium": "balanced", "high": "quality", "hd": "quality"}
    return {"preset": named[quality]} if quality in named else {}


class Part(Strict):
    """A piece of a message: text or a picture."""

    type: Literal["text", "image_url", "input_text", "output_text", "input_image"]
    text: Text | None = None
    image_url: ImageUrl | str | None = None
    detail: Literal["auto", "low", "high", "original"] | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None

    @model_validator(mode="after")
    def holds_what_it_says(self) -> Part:
        """A text has its text, a picture its address."""
        wanted = "text" if self.type.endswith("text") else "image_url"
        if getattr(self, wanted) is None:
            raise ValueError(f"a part of type {self.type!r} lacks its {wanted!r}")
        return self

    @property
    def url(self) -> str:
        """Of a picture."""
        return self.image_url.url if isinstance(self.image_url, ImageUrl) else str(self.image_url)


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] | None = None
    images: list[Part] | None = None
    """Pictures of the assistant, as this server writes them beside ``content``."""
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


class StreamOptions(Strict):
    """Of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatRequest(Body, Drawn):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1)] | None = None
    """None and ``["text"]``: an answer in words; ``["image"]``: a picture; both: the model decides."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    n_images: Annotated[int, Field(ge=1, le=MOST_PICTURES)] = 1
    """Pictures, if one is drawn; ours."""
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    """Unfinished states of each picture in a streamed answer, as ``delta.partial_image``; ours."""

    @property
    def mode(self) -> str:
        """Of the engine."""
        asked = set(self.modalities or ["text"])
        return "auto" if len(asked) == 2 else asked.pop()

    @property
    def stops(self) -> list[str]:
        """Texts before which the answer ends."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in found if text]


class ImagesRequest(Body, Drawn):
    """``POST /v1/images/generations``."""

    prompt: Text
    n: Annotated[int, Field(ge=1, le=MOST_PICTURES)] = 1
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 95
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = None
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Of a head that samples."""

    def drawing(self) -> dict[str, Any]:
        """What the engine is asked for; ``quality`` is a preset, for settings that are not given."""
        return super().drawing() | preset_of(self.quality)


class Tool(Strict):
    """A tool of the Responses API: pictures only."""

    type: Literal["image_generation"]
    model: str | None = None
    size: Annotated[str, StringConstraints(pattern=r"^(auto|\d{1,5}x\d{1,5})$")] | None = None
    quality: Literal["auto", "low", "medium", "high"] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 95
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    action: Literal["auto", "generate"] | None = None


class Drawing(Strict):
    """A picture of an earlier answer, as the Responses API hands it back."""

    type: Literal["image_generation_call"]
    id: str | None = None
    status: str | None = None
    result: Annotated[str, StringConstraints(max_length=64 << 20)]


class InputMessage(ChatMessage):
    """A message of the Responses API."""

    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None


class ResponsesRequest(Body):
    """``POST /v1/responses``."""

    input: Text | Annotated[list[InputMessage | Drawing], Field(max_length=1000)]
    instructions: Text | None = None
    previous_response_id: Annotated[str, StringConstraints(max_length=100)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Tool], Field(max_length=1)] = []
    tool_choice: Literal["auto", "none", "required"] | dict[str, str] = "auto"
    """With the tool: the model decides, never, always; ``{"type": "image_generation"}`` is always."""
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Seed | None = None

    @property
    def mode(self) -> str:
        """Of the engine."""
        if not self.tools or self.tool_choice == "none":
            return "text"
        return "auto" if self.tool_choice == "auto" else "image"
