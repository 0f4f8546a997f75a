"""What the Responses API remembers."""

from __future__ import annotations

import pytest

from open_pisces.serve import responses
from open_pisces.serve.errors import ApiError
from open_pisces.serve.responses import Conversations
from open_pisces.serve.schemas import ChatMessage, ResponsesRequest


def after(id: str) -> ResponsesRequest:
    return ResponsesRequest(input="and then?", previous_response_id=id)


def test_a_conversation_goes_on_with_its_answer() -> None:
    kept = Conversations()
    kept.keep("a", [ChatMessage(role="user", content="draw")], "", [b"picture"])
    found = kept.messages(after("a"))
    assert [message.role for message in found] == ["user", "assistant", "user"]
    assert found[1].content[0].url.startswith("data:image/png;base64,")  # type: ignore[union-attr]


def test_the_oldest_are_forgotten_by_number_and_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Conversations()
    monkeypatch.setattr(responses, "REMEMBERED", 3)
    for number in range(5):
        kept.keep(str(number), [], "words", [])
    assert list(kept.kept) == ["2", "3", "4"] == list(kept.sizes)
    monkeypatch.setattr(responses, "MOST_BYTES", 5000)
    kept.keep("large", [], "x" * 4800, [])
    assert list(kept.kept)[-1] == "large" and sum(kept.sizes.values()) <= 5000
    kept.keep("huge", [], "x" * 6000, [])
    assert not kept.kept
    with pytest.raises(ApiError, match="no response 'huge' is remembered"):
        kept.messages(after("huge"))
