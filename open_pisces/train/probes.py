"""Pictures and answers written during training, so that a run can be judged by looking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from open_pisces.batch import Sample, wide
from open_pisces.config import RunConfig
from open_pisces.data.images import contact_sheet, generation_pixels, to_pil
from open_pisces.data.shards import ShardReader, data_path
from open_pisces.generate import Generator
from open_pisces.model.gen_clip import GenCLIP
from open_pisces.model.pisces import Pisces
from open_pisces.train.distributed import World, gathered
from open_pisces.train.objectives import Training

COUNT = 8


Probe = Callable[[RunConfig, Training, Path, int, World], None]
"""Recipe, training, folder, step, processes: all of them call it, because together they hold the model."""


@torch.no_grad()
def probe(config: RunConfig, training: Training, folder: Path, step: int, world: World) -> None:
    """Write ``step-N.png`` (and ``step-N.txt`` for answers) about held-out pictures of the packaged fixture."""
    with gathered(training.module), TemporaryDirectory() as elsewhere:
        _probe(training, folder if world.is_first else Path(elsewhere), step, str(world.device))


def _probe(training: Training, folder: Path, step: int, device: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    reader = ShardReader(data_path("fixture/pairs"))
    samples = [reader[i] for i in range(min(COUNT, len(reader)))]
    module = training.module.eval()
    if isinstance(module, Pisces):
        _probe_pisces(module, training.tokenizer, samples, folder / f"step-{step}", device)
    elif isinstance(module, GenCLIP):
        _probe_contrastive(module, training.tokenizer, samples, folder / f"step-{step}")
    else:
        _probe_decoder(module, training, samples, folder / f"step-{step}")


def _pixels(samples: list[Sample], size: int, like: torch.nn.Module) -> torch.Tensor:
    stacked = torch.stack([torch.from_numpy(generation_pixels(s.images[0], size)) for s in samples])
    return stacked.to(next(like.parameters()).device)


def _probe_contrastive(module: GenCLIP, tokenizer: Any, samples: list[Sample], path: Path) -> None:
    """Each picture with the caption it finds among those shown, and with MAE what it makes of a quarter of it."""
    pixels = _pixels(samples, module.vision.image_size, module)
    # Padded here: a tokenizer that is asked to pad remembers it, and would be saved with it.
    rows = [torch.tensor([*tokenizer(s.short)["input_ids"][:76], tokenizer.eos_token_id]) for s in samples]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
    texts = module.embed_texts(ids.to(pixels.device), mask.to(pixels.device))
    found = (module.embed_images(pixels) @ texts.T).argmax(1).tolist()
    images, words = [s.images[0] for s in samples], [samples[i].short for i in found]
    if module.mae is not None:
        keep = torch.arange(0, module.mae.positions.shape[0] - 1, 4, device=pixels.device).expand(len(samples), -1)
        patch, side = module.mae.patch, module.vision.image_size // module.mae.patch
        guessed = module.mae(module.vision(pixels, keep), keep).float()
        guessed = guessed.unflatten(1, (side, side)).unflatten(-1, (3, patch, patch))
        drawn = guessed.permute(0, 3, 1, 4, 2, 5).reshape(len(samples), 3, side * patch, side * patch)
        images += [to_pil(picture) for picture in (drawn / 4 + 0.5).clamp(0, 1).cpu().numpy()]
        words += ["MAE, normalised"] * len(samples)
    contact_sheet(images, words, COUNT).save(path.with_suffix(".png"))


def _probe_decoder(module: Any, training: Any, samples: list[Sample], path: Path) -> None:
    """True pictures above their reconstructions from true vectors."""
    encoder, decoder, statistics = module.generation_encoder, module.decoder, module.statistics
    raw = wide(module.pooler(encoder.features(_pixels(samples, encoder.image_size, encoder))))
    noise = torch.randn(len(samples), *decoder.latent_shape, generator=torch.Generator().manual_seed(0)).to(raw)
    drawn = decoder.sample(raw, statistics.leave(statistics.null_ME), noise, 20, 1.0)
    images = [s.images[0] for s in samples] + [to_pil(picture) for picture in drawn.float().cpu().numpy()]
    contact_sheet(images, [s.short for s in samples] + ["from its vectors"] * len(samples), COUNT).save(
        path.with_suffix(".png")
    )


def _probe_pisces(module: Pisces, tokenizer: Any, samples: list[Sample], path: Path, device: str) -> None:
    """What the model says of pictures, and what it draws from their captions when it has a decoder."""
    generator = Generator(module, tokenizer, device)
    asked = [s.questions[i % len(s.questions)] if s.questions else None for i, s in enumerate(samples)]
    prompts = [q.question if q else "Describe the image briefly." for q in asked]
    answers = generator.text([[s.images[0]] for s in samples], prompts, max_new_tokens=24)
    lines = [
        f"{s.short} | {p} -> {a}" + (f" (expected {q.answer})" if q else "")
        for s, p, a, q in zip(samples, prompts, answers, asked, strict=True)
    ]
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    if module.decoder is not None:
        drawn = [row[0] for row in generator.image([s.short for s in samples], steps=20)]
        images = [s.images[0] for s in samples] + drawn
        words = [s.short for s in samples] + ["drawn"] * len(samples)
        contact_sheet(images, words, COUNT).save(path.with_suffix(".png"))
