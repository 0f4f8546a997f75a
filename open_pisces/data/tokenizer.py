"""Tokenizers: byte-level ones of our own for the small scales, any pretrained one at ``8b``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from open_pisces.settings import ConfigError

BEGIN_IMAGE = "[IMG]"
END_IMAGE = "[/IMG]"
PLACEHOLDER = "<image>"
MOST_WORDS = 5000
"""Words up to which a tokenizer keeps the list of those it was trained on."""


@lru_cache
def read_template(name: str) -> dict[str, Any]:
    """The chat template of that name, from ``data/templates``; one may extend another."""
    frame = yaml.safe_load((Path(__file__).parent / "templates" / f"{name}.yaml").read_text())
    base = read_template(frame.pop("extends")) if "extends" in frame else {}
    return {**base, **frame}


def special_tokens(template: str) -> list[str]:
    """Every token that only a template may produce: its frame's and the three of pictures."""
    frame = read_template(template)
    pieces = [frame["pad"], frame["begin"], *frame["open"].values(), frame["close"]]
    found = re.findall(r"<\|[^|]+\|>", "".join(pieces))
    return [*dict.fromkeys(found), BEGIN_IMAGE, END_IMAGE, PLACEHOLDER]


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """256 bytes and the special tokens: nothing to train, for ``nano`` and for tests."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[])
    return _wrap(_byte_level(Tokenizer(model)), template)


def train_tokenizer(texts: Iterable[str], vocab_size: int, template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``vocab_size`` tokens, special tokens included.

    It keeps the words of the texts as its setting ``known_words``, so that a prompt with others can be told
    (`generate.words`); of more than `MOST_WORDS` none are kept.
    """
    words: set[str] = set()
    tokenizer = _byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens(template)),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_noting_words(texts, words), trainer)
    wrapped = _wrap(tokenizer, template)
    if len(words) <= MOST_WORDS:
        wrapped.init_kwargs["known_words"] = sorted(words)
    return wrapped


def _noting_words(texts: Iterable[str], words: set[str]) -> Iterator[str]:
    """The texts as they are; their words are added to ``words`` on the way."""
    for text in texts:
        if len(words) <= MOST_WORDS:
            words.update(words_of(text))
        yield text


def words_of(text: str) -> list[str]:
    """The words of a text in their order, in lower case; signs are left out."""
    return re.findall(r"[^\W_]+", text.lower())


def load_tokenizer(source: str | Path, template: str) -> PreTrainedTokenizerFast:
    """A pretrained tokenizer (folder, hub name or GGUF file), with the picture tokens added where it lacks them.

    Raises:
        ConfigError: if it cannot be fetched, or lacks tokens of the chat template, so that it belongs to another.
    """
    try:
        path = Path(source)
        where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent if where else source), **where)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"model.tokenizer = {source}: {str(error).splitlines()[0]}: name a folder with a tokenizer, or a hub name "
            "that can be reached from here"
        ) from None
    missing = [token for token in special_tokens(template) if token not in tokenizer.get_vocab()]
    foreign = [token for token in missing if token not in (BEGIN_IMAGE, END_IMAGE, PLACEHOLDER)]
    if foreign:
        raise ConfigError(
            f"model.template = {template}: the tokenizer {source} lacks its {foreign[0]}: set the template that the "
            "LLM was tuned with"
        )
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    tokenizer.pad_token = read_template(template)["pad"]
    return tokenizer


def _byte_level(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    frame = read_template(template)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special_tokens(template)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=frame["pad"],
        bos_token=frame["begin"] or None,
        eos_token=frame["close"],
        clean_up_tokenization_spaces=False,
    )
    jinja = frame.get("jinja")
    # ChatML's templates differ by their system text alone.
    wrapped.chat_template = jinja and "{% set system = " + repr(frame["system"]) + " %}" + jinja
    return wrapped
