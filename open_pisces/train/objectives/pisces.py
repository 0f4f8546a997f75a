"""Pisces itself: cross-entropy on text, squared error on vectors; LLM and MLPs learn, encoders do not (the paper)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from open_pisces.batch import Losses, Sample, SequenceBatch
from open_pisces.config import RunConfig
from open_pisces.data.lengths import check_lengths
from open_pisces.data.loader import SequenceLoader
from open_pisces.data.order import Mixture
from open_pisces.data.prompts import MULTIPLE, LengthError, Renderer
from open_pisces.data.tokenizer import BEGIN_IMAGE, END_IMAGE, PLACEHOLDER
from open_pisces.generate.generator import Generator
from open_pisces.model.adapters import AdapterError, adapter_layers, attach_adapter
from open_pisces.model.folder import in_start, without_sources
from open_pisces.model.parts import PARTS, build_part, is_shared
from open_pisces.model.pisces import HistoryNoise, Pisces, with_blank_pictures
from open_pisces.settings import ConfigError
from open_pisces.sheets import contact_sheet
from open_pisces.train.flops import (
    Cost,
    Counts,
    frozen_generation_encoder,
    learns,
    length_costs,
    meta,
    meta_part,
    unit_cost,
)
from open_pisces.train.objectives.base import Objective, draw, get_features, get_parts, get_tokenizer, vocabulary
from open_pisces.train.shapes import Shape, empty_sequences
from open_pisces.train.world import World

DRAWING = {"generate_short", "generate_detailed", "reconstruct"}
"""Tasks that end in a picture."""
TRAINED = ("llm", "understanding_encoder", "generation_encoder", "bridge")


class PiscesObjective(Objective):
    """The stages of the paper; they differ by their data and rates."""

    has_sequences = True
    module: Pisces

    def __init__(self, config: RunConfig, world: World) -> None:
        super().__init__(config, world)
        self.tokenizer = get_tokenizer(config)
        start = config.model
        _check_adapter(config, world.ranks, world.is_first)
        names = (*TRAINED, "decoder") if in_start(start, "decoder") else TRAINED
        parts = get_parts(names, config, world, len(self.tokenizer))
        _set_up_adapter(parts["llm"], config, self.tokenizer)
        self.module = Pisces(start, **parts, weights=config.loss)
        _freeze(self.module, config)
        # The transformer alone: embedding, head and loss change shape with what is supervised.
        self.compiled = self.module.llm.get_decoder()
        # What learns is written; what is frozen only where the folder this training starts from does not hold it.
        frozen = config.train.freeze
        self.parts = {name: parts[name] for name in TRAINED if name not in frozen or not in_start(start, name)}
        if config.train.lora and in_start(start, "llm"):
            # The base is the start folder's: only the adapter is written.
            self.parts["adapter"] = self.parts.pop("llm")
        self.load = self._loader()

    def _loader(self) -> SequenceLoader:
        config = self.config
        module = self.module
        mixture = Mixture(config.data, config.seed)
        seen = module.understanding_encoder
        drawn = module.generation_encoder
        renderer = Renderer(self.tokenizer, config.model.template, seen.vectors, config.model.generation.vectors)
        check_lengths_together(mixture, renderer, config, self.world)
        return SequenceLoader(
            mixture,
            renderer,
            config.data,
            config.seed,
            config.train.batch_size,
            config.train.accumulate,
            (seen.image_size, drawn.image_size),
            get_features(config, mixture, self.world),
            # A compiled LLM gets few lengths to compile; otherwise rows are as short as they can be.
            MULTIPLE if config.train.compile or not config.data.row_length else 8,
            self.world.rank,
            self.world.ranks,
        )

    def losses(self, batch: SequenceBatch) -> Losses:
        """Both losses. Of several ranks each runs every module, with blank pictures where a batch has none."""
        given = batch if self.world.ranks == 1 else with_blank_pictures(batch)
        return self.module(given, self._head_draws(batch), self._history_noise(batch))

    def _history_noise(self, batch: SequenceBatch) -> HistoryNoise | None:
        """Noise for the vectors that are fed; each picture's share and numbers from its own stream."""
        most = self.config.loss.history_noise
        if not most:
            return None
        shape = self.config.model.generation.vectors, self.config.model.generation.width
        streams = [draw(self.config, drawn, "history") for drawn in batch.draws]
        shares = torch.tensor([stream.uniform(0, most) for stream in streams], dtype=torch.float32)
        numbers = [stream.standard_normal(shape, np.float32) for stream in streams]
        noise = torch.from_numpy(np.array(numbers, np.float32).reshape(len(streams), *shape))
        return HistoryNoise(shares.to(batch.ids_BS.device), noise.to(batch.ids_BS.device))

    def _head_draws(self, batch: SequenceBatch) -> Tensor | None:
        """Standard normal numbers for the head's loss, ``(K, loss_draws)``; each picture's from its own stream."""
        numbers = self.module.bridge.head.loss_draws
        if not numbers:
            return None
        vectors = self.config.model.generation.vectors
        streams = [draw(self.config, drawn, "head") for drawn in batch.draws]
        found = np.array([one.standard_normal((vectors, numbers), np.float32) for one in streams], np.float32)
        return torch.from_numpy(found.reshape(len(streams) * vectors, numbers)).to(batch.ids_BS.device)

    def idle(self, batch: SequenceBatch) -> list[nn.Module]:
        """What belongs to a task that the global batch does not have."""
        bridge = self.module.bridge
        found = list[nn.Module]()
        if not batch.total_vectors:
            found += [bridge.generation_projector, bridge.head]
        if not batch.total_seen:
            found += [bridge.understanding_projector, self.module.understanding_encoder]
        return found

    def probe(self, samples: list[Sample], path: Path) -> None:
        """What the model says of pictures, and what it draws from their captions when it has a decoder."""
        generator = Generator(self.module, self.tokenizer, str(self.world.device))
        pictures = [sample.images[0] for sample in samples]
        captions = [sample.short for sample in samples]
        prompts = ["Describe the image briefly."] * len(samples)
        expected = [""] * len(samples)
        for number, sample in enumerate(samples):
            if sample.questions:  # another one for each sample, so that all kinds come up
                asked = sample.questions[number % len(sample.questions)]
                prompts[number] = asked.question
                expected[number] = f" (expected {asked.answer})"
        answers = generator.text([[picture] for picture in pictures], prompts, max_new_tokens=24)
        rows = zip(captions, prompts, answers, expected, strict=True)
        lines = [f"{caption} | {prompt} -> {answer}{wanted}\n" for caption, prompt, answer, wanted in rows]
        path.with_suffix(".txt").write_text("".join(lines))
        if self.module.decoder is not None:
            images = pictures + [row[0] for row in generator.image(captions, steps=20)]
            words = captions + ["drawn"] * len(samples)
            contact_sheet(images, words, len(samples)).save(path.with_suffix(".png"))

    @classmethod
    def skeleton(cls, config: RunConfig) -> nn.Module:
        """All parts on the meta device.

        The decoder is among them if the folder that the stage starts from holds it, or will once it has been trained.
        """
        model = without_sources(config.model)
        start = config.model.start
        painted = start is not None and (in_start(config.model, "decoder") or not Path(start).is_dir())
        with torch.device("meta"):
            names = [name for name in PARTS if painted or name != "decoder"]
            parts = {name: build_part(name, model, vocabulary(config)) for name in names}
            # Fused kernels keep less than our chunks, but run on CUDA only.
            pisces = Pisces(model, **parts, weights=config.loss.model_copy(update={"kernel": "chunked"}))
            if config.train.lora:
                attach_adapter(pisces.llm, config.train.lora)
        _freeze(pisces, config)
        return pisces

    @staticmethod
    def costs(module: Any, config: RunConfig) -> Iterator[Cost]:
        """The LLM by tokens, the encoders by pictures, what lies between by vectors."""
        llm = meta_part(module, "llm")
        bridge = meta_part(module, "bridge")
        seen = meta_part(module, "understanding_encoder")
        own = config.loss.own_passes
        width = llm.config.hidden_size
        reached = learns(llm, bridge, seen)

        def read(length: int) -> Tensor:
            mask = meta(1, 1, length, length, dtype=torch.bool)
            places = meta(1, length, dtype=torch.long)
            embedded = meta(1, length, width, grad=reached)
            found = llm.get_decoder()(inputs_embeds=embedded, attention_mask=mask, position_ids=places, use_cache=False)
            return found.last_hidden_state

        yield from length_costs("llm", ("tokens", "token_pairs"), read, again=own)
        yield unit_cost("llm_head", "supervised", lambda: llm.get_output_embeddings()(meta(1, width, grad=reached)))
        feeder = bridge.generation_projector
        projector = bridge.understanding_projector
        features = meta(1, projector.first.in_features, grad=learns(seen))
        yield unit_cost("bridge", "seen_vectors", lambda: projector(features))
        for _ in range(1 + own):
            yield unit_cost("bridge", "drawn_vectors", lambda: feeder(meta(1, feeder.first.in_features)))
        yield unit_cost("bridge", "drawn_vectors", lambda: bridge.head.sample(meta(1, width, grad=reached)), again=own)
        picture = meta(1, 3, seen.image_size, seen.image_size)
        yield unit_cost("understanding_encoder", "seen_pictures", lambda: seen(picture))
        yield frozen_generation_encoder(module)

    @staticmethod
    def rehearsal(module: Any, config: RunConfig, shape: Shape) -> Callable[[], Tensor]:
        """Forward and loss of a micro-batch."""
        batch = empty_sequences(module, config, shape)
        return lambda: module(batch).loss

    @staticmethod
    def picture_bytes(module: Any, counts: Counts, samples: int) -> float:
        """Pictures at the size of the encoder that they are for."""
        seen = counts.seen_pictures / samples * module.understanding_encoder.image_size**2
        drawn = counts.drawn_pictures / samples * module.generation_encoder.image_size**2
        return 3.0 * (seen + drawn)


def _freeze(pisces: Pisces, config: RunConfig) -> None:
    """Freeze what the recipe says.

    Raises:
        ConfigError: for one encoder of both tasks that is not frozen: its two uses would learn apart.
    """
    encoders = {"understanding_encoder", "generation_encoder"}
    if is_shared(config.model) and not encoders <= set(config.train.freeze):
        raise ConfigError(
            f"{config.name}: model.understanding.tower = generation: train.freeze has to name both encoders"
        )
    for name in config.train.freeze:
        if getattr(pisces, name, None) is not None:
            getattr(pisces, name).requires_grad_(False)


def _check_adapter(config: RunConfig, ranks: int, is_first: bool) -> None:
    """Refuse what LoRA cannot do before anything is read, and say when the other task may be forgotten.

    Raises:
        AdapterError: for four bits with settings that they do not go with, or with nothing to quantize.
    """
    if not config.train.lora:
        return
    if config.train.lora.bits == 4:
        name = f"{config.name}: train.lora.bits = 4"
        if ranks > 1:
            raise AdapterError(f"{name} trains on one GPU, not on {ranks}: start one process, or set 16")
        if config.train.precision != "bf16":
            raise AdapterError(f"{name} computes in bfloat16: set train.precision=bf16")
        if not in_start(config.model, "llm"):
            raise AdapterError(f"{name} quantizes the LLM of a model folder, and model.start holds none: set 16")
    tasks = {task for source in config.data.sources for task in source.tasks}
    drawing = tasks & DRAWING
    if is_first and (not drawing or drawing == tasks):
        kept, lost = ("draw", "answer") if drawing else ("answer", "draw")
        print(
            f"pisces: {config.name}: all tasks teach it to {kept}, it will forget how to {lost}: add a source that "
            "replays the other task",
            file=sys.stderr,
        )


def _set_up_adapter(llm: Any, config: RunConfig, tokenizer: Any) -> None:
    """What ``train.lora`` asks for, or a refusal.

    Raises:
        AdapterError: if the LLM's base would not learn and nothing else would, or what LoRA cannot teach is untrained.
    """
    start = config.model
    if not config.train.lora:
        if adapter_layers(llm) and "llm" not in config.train.freeze:
            raise AdapterError(
                f"{config.name}: model.start = {start.start} holds an adapter, its base would not learn: merge it "
                "first with `pisces export MODEL OUT`, or set train.lora"
            )
        return
    if not in_start(start, "bridge") and not start.fresh:
        raise AdapterError(
            f"{config.name}: train.lora tunes a trained Pisces, and model.start = {start.start} has no bridge: train "
            "its stages first, or set model.fresh=[bridge] to start from an LLM that has been in none"
        )
    rows = llm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise AdapterError(
            f"{config.name}: the tokenizer has {len(tokenizer)} tokens and the LLM {rows}: they do not belong together"
        )
    # An LLM that has never been in a Pisces does not know the places of pictures.
    fresh = tokenizer.convert_tokens_to_ids([BEGIN_IMAGE, END_IMAGE, PLACEHOLDER]) if start.fresh else []
    attach_adapter(llm, config.train.lora, fresh)


def check_lengths_together(mixture: Mixture, renderer: Renderer, config: RunConfig, world: World) -> None:
    """Each rank checks its share of the data; what one finds, all refuse.

    Raises:
        LengthError: naming a sample over ``data.max_length``.
    """
    found = ""
    try:
        check_lengths(mixture, renderer, config.data, world.rank, world.ranks)
    except LengthError as error:
        found = str(error)
    for message in world.gather_objects(found):
        if message:
            raise LengthError(message)
