"""What the task files of this folder call: pictures are the package's own scenes, so nothing is fetched."""

from __future__ import annotations

from functools import cache
from typing import Any

from PIL.Image import Image

from open_pisces.data.shards import ShardReader, data_path

Doc = dict[str, Any]


@cache
def scene(number: int) -> Image:
    """A packaged scene of two things that never stood together in training."""
    return ShardReader(data_path("fixture/pairs"))[number].images[0]


def visuals(doc: Doc) -> list[Image]:
    return [scene(doc["scene"])]


def text(doc: Doc) -> str:
    return str(doc["question"])


def gold(doc: Doc) -> int:
    return int(doc["choices"].index(doc["answer"]))


def messages(doc: Doc) -> list[dict[str, Any]]:
    """A conversation with an example before the question: two pictures, words on both sides of the first."""
    example = [
        {"type": "text", "text": "Look at this."},
        {"type": "image", "url": scene(0)},
        {"type": "text", "text": "Which thing is on the left?"},
    ]
    question = [{"type": "image", "url": scene(doc["scene"])}, {"type": "text", "text": doc["question"]}]
    return [
        {"role": "user", "content": example},
        {"role": "assistant", "content": [{"type": "text", "text": "blue circle"}]},
        {"role": "user", "content": question},
    ]


def rounds(
    doc: Doc,
    lmms_eval_specific_kwargs: Any = None,
    round_idx: int | None = None,
    previous_output: list[str] | None = None,
    previous_round_info: Any = None,
) -> Any:
    """The question, then one without a picture about the answer, then the question with a picture again."""
    if round_idx is None:
        return doc["question"]
    said = list(previous_output or [])
    if round_idx == 1:
        return None, f"Is {said[0]} a colour?", False, said, {"first": said[0]}
    if round_idx == 2:
        return visuals(doc), doc["question"], False, said, previous_round_info
    return None, None, True, said, previous_round_info


def right(doc: Doc, results: list[str]) -> dict[str, float]:
    return {"exact_match": float(results[0].strip().lower() == doc["answer"])}


def right_again(doc: Doc, results: list[Any]) -> dict[str, float]:
    """Three answers, the third of them the first: every round has a beginning of its own."""
    first, _, third = results[0]
    return {"exact_match": float(first.strip().lower() == doc["answer"]), "same_again": float(first == third)}
