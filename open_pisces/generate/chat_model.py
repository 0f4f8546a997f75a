"""A language model behind an address that speaks OpenAI's chat completions: judges and captioners.

The official ``openai`` client does the requests and their retries: 408, 409, 429, 5xx, time-outs and lost connections,
with growing pauses (or those that the server asks for). Needs the extra ``eval``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from open_pisces.errors import PiscesError

PASSING = (408, 409, 429)
"""Statuses below 500 after which the client tries again."""


class ChatModelError(PiscesError):
    """A model that cannot be used; the message names it and the remedy."""


class RefusedError(ChatModelError):
    """An endpoint that refuses a request for a reason that will not pass.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Reply:
    """What a model said."""

    text: str
    """Never empty."""
    finished: bool = True
    """False where ``max_tokens`` cut it off."""


class NoReply(Exception):
    """A request without a usable reply, after all tries."""


@dataclass(frozen=True)
class ChatModel:
    """A model behind an address.

    Its key is read from the environment for each request, and written nowhere. Threads may share one.
    """

    model: str
    """Its name at the endpoint, with its version."""
    url: str = "https://api.openai.com/v1"
    """Up to, not with, ``/chat/completions``."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; local servers need none."""
    timeout: float = 60.0
    """Seconds until a request is given up."""
    tries: int = 6
    """Requests for one reply before it counts as missing: pauses of 0.5, 1, 2, 4 and 8 s, some 14 s in all."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ChatModelError(f"the address {self.url!r} is no http address: give one as http://host:8000/v1")

    def reply(self, messages: Sequence[Mapping[str, Any]], temperature: float = 0.0, max_tokens: int = 256) -> str:
        """What the model says, never empty: the text of `complete`."""
        return self.complete(messages, temperature, max_tokens).text

    def complete(self, messages: Sequence[Mapping[str, Any]], temperature: float = 0.0, max_tokens: int = 256) -> Reply:
        """What the model says, and whether it came to an end.

        Args:
            messages: in OpenAI's form, ``{"role", "content"}``; pictures are ``image_url`` parts of the content.
            temperature: 0 takes the likeliest words.
            max_tokens: the longest reply.

        Raises:
            NoReply: if nothing usable comes in `tries` requests.
            RefusedError: if the endpoint refuses for a reason that will not pass: key, name, address.
            ChatModelError: without the library.
        """
        client = self._client  # first: it says what to install where the library is missing
        import openai

        key = os.environ.get(self.key_variable)
        try:
            found = client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=messages,
                temperature=temperature,
                max_tokens=max_tokens,
                extra_headers={"Authorization": f"Bearer {key}" if key else openai.omit},
            )
            return _reply_of(found.content)
        except openai.APIStatusError as error:
            if error.status_code < 500 and error.status_code not in PASSING:
                reason = " ".join(error.response.text[:300].split())
                raise RefusedError(
                    f"{self.model} at {self.url} refuses: HTTP {error.status_code} {error.response.reason_phrase}; "
                    f"{reason}. Check the model's name, the address and the key in {self.key_variable}",
                    error.status_code,
                ) from None
            why = f"HTTP {error.status_code}"
        except openai.APIConnectionError as error:
            why = f"{type(error.__cause__).__name__}: {error.__cause__}"
        raise NoReply(f"{self.model} at {self.url}: no reply in {self.tries} tries ({why})")

    def models(self) -> list[str] | None:
        """The models that the endpoint names; None where it has no such list.

        Raises:
            ChatModelError: if nothing answers at the address (one try), or it wants another key.
        """
        client = self._client
        import openai

        key = os.environ.get(self.key_variable)
        header = {"Authorization": f"Bearer {key}" if key else openai.omit}
        try:
            found = client.with_options(max_retries=0).models.with_raw_response.list(extra_headers=header)
            return [str(row["id"]) for row in json.loads(found.content)["data"]]
        except openai.APIConnectionError as error:
            raise ChatModelError(
                f"nothing answers at {self.url} ({error.__cause__ or error}): start the server, or check the address"
            ) from None
        except openai.AuthenticationError:
            raise ChatModelError(f"{self.url} refuses the key in {self.key_variable}: set that variable") from None
        except (openai.APIStatusError, ValueError, LookupError, TypeError):
            return None

    @cached_property
    def _client(self) -> Any:
        """The client; keys are given with each request.

        Raises:
            ChatModelError: without the library.
        """
        try:
            import openai
        except ModuleNotFoundError:
            raise ChatModelError(f"{self.model}: needs the openai library: pip install 'open-pisces[eval]'") from None
        # The client insists on a key of its own: what is sent is the header of each request.
        http = openai.DefaultHttpxClient(event_hooks={"response": [_refuse_without_text]})
        return openai.OpenAI(
            base_url=self.url, api_key="-", timeout=self.timeout, max_retries=self.tries - 1, http_client=http
        )


def _refuse_without_text(response: Any) -> None:
    """Make a 502 of a reply without text, such as a proxy's page sent as 200: the client then tries again."""
    response.read()
    try:
        usable = not response.is_success or _is_usable(response)
    except (ValueError, LookupError, TypeError, AttributeError):
        usable = False
    if not usable:
        response.status_code = 502


def _is_usable(response: Any) -> bool:
    """Whether a reply holds what was asked for; a list of models is for `ChatModel.models` to judge."""
    return not response.request.url.path.endswith("/chat/completions") or _reply_of(response.content).text != ""


def _reply_of(content: bytes) -> Reply:
    """The reply of a chat completion, whatever type the server says that its JSON is."""
    choice: Any = json.loads(content)["choices"][0]
    return Reply(choice["message"]["content"].strip(), choice.get("finish_reason") != "length")
