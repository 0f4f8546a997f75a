"""The decoder's training on vectors with noise: how much, told to the decoder, and the same whatever the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import nano
from torch import Tensor

from open_pisces.batch import Sample
from open_pisces.config import RunConfig
from open_pisces.data.features import FeatureError
from open_pisces.data.images import to_pil
from open_pisces.data.shards import open_dataset
from open_pisces.factory.encoders import caption_of, fingerprints, store_keys
from open_pisces.generate.generator import Generator
from open_pisces.generate.painter import Painter
from open_pisces.settings import ConfigError
from open_pisces.train.loop import train
from open_pisces.train.objectives import build_training


def given(runs: Path, *settings: str, step: int = 0) -> list[dict[str, Any]]:
    """What the decoder is given in a step, batch by batch."""
    training = build_training(nano(runs, "decoder", "train.batch_size=12", *settings))
    module: Any = training.module
    found = []

    def watched(latents: Tensor, vectors: Tensor, noise: Tensor, times: Tensor, levels: Tensor | None) -> Tensor:
        found.append({"vectors": vectors, "levels": levels, "names": batch.draws})
        return torch.zeros(len(latents), requires_grad=True)

    module.decoder.forward = watched
    for batch in training.load(step).with_totals():
        found_before = len(found)
        training.losses(batch)
        found[found_before]["true"] = module.vectors(batch)
        found[found_before]["null"] = module.statistics.destandardize(module.statistics.null_ME)
        found[found_before]["std"] = module.statistics.std_E
    return found


def test_without_it_vectors_are_true_and_nothing_is_told(runs: Path) -> None:
    (batch,) = given(runs, "diffusion.drop_condition=0")
    assert torch.equal(batch["vectors"], batch["true"]) and batch["levels"] is None


def test_noise_has_the_level_that_is_told_in_deviations_of_the_targets(runs: Path) -> None:
    (batch,) = given(runs, "diffusion.drop_condition=0", "diffusion.noisy=1", "diffusion.noise=0.8")
    levels = batch["levels"]
    assert 0 <= levels.min() and levels.max() <= 0.8 and levels.std() > 0.1
    apart = ((batch["vectors"] - batch["true"]) / batch["std"]).flatten(1)
    torch.testing.assert_close(apart.std(1), levels, rtol=0.25, atol=0.01)


def test_a_share_of_the_pictures_stays_true(runs: Path) -> None:
    batches = [given(runs, "diffusion.drop_condition=0", "diffusion.noisy=0.5", step=step)[0] for step in range(4)]
    levels = torch.cat([batch["levels"] for batch in batches])
    assert 0.2 < (levels == 0).float().mean() < 0.8
    for batch in batches:
        clean = batch["levels"] == 0
        assert torch.equal(batch["vectors"][clean], batch["true"][clean])


def test_a_dropped_condition_has_no_error(runs: Path) -> None:
    (batch,) = given(runs, "diffusion.drop_condition=1", "diffusion.noisy=1")
    assert torch.equal(batch["levels"], torch.zeros(12))
    torch.testing.assert_close(batch["vectors"], batch["null"].expand_as(batch["vectors"]))


def test_noise_belongs_to_the_picture(runs: Path) -> None:
    both = []
    for cut in (1, 3):
        batches = given(runs, "diffusion.noisy=1", f"train.accumulate={cut}", step=1)
        names = [name for batch in batches for name in batch["names"]]
        both.append(dict(zip(names, torch.cat([batch["levels"] for batch in batches]).tolist(), strict=True)))
    assert both[0] == both[1]


def test_a_training_with_it_learns_the_levels_place_and_saves_it(runs: Path, tmp_path: Path) -> None:
    config = nano(runs, "decoder", "diffusion.noisy=0.8", "train.steps=3", out=tmp_path / "noisy")
    painter = Painter.from_pretrained(train(config, probes=()) / "model", "cpu")
    assert painter.decoder.condition.level_E.abs().max() > 0


def test_drawings_are_told_the_models_level_and_reconstructions_none(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter = Painter.from_pretrained(runs / "decoder" / "model", "cpu")
    painter.settings = painter.settings.model_copy(update={"noise_level": 0.35})
    told: list[float] = []
    honest = painter.decoder.sample

    def watched(*args: Any) -> Tensor:
        told.append(args[5])
        return honest(*args)

    monkeypatch.setattr(painter.decoder, "sample", watched)
    picture = to_pil(torch.rand(3, 32, 32).numpy())
    painter.reconstruct([picture], steps=1)
    painter.pixels(painter.encode([picture]), None, [0], 1, 1.0, 0)
    painter.pixels(painter.encode([picture]), None, [0], 1, 1.0, 0, level=0.1)
    assert told == [0.0, 0.35, 0.1]


# ---------------------------------------------------------------------------------------------- the LLM's vectors


@pytest.fixture(scope="module")
def predicting(runs: Path) -> Iterator[Any]:
    """Settings by which nano's decoder trains on the vectors of stage 3's LLM, from the stores of the shared runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PISCES_DATA", str(runs / "data"))
        yield lambda *more: nano(
            runs, "decoder_on_predicted", "train.batch_size=12", "diffusion.drop_condition=0", *more
        )


def step_of(config: RunConfig) -> tuple[Any, Any, list[Tensor]]:
    """The training, its first batch, and what its decoder is given: latents, vectors, noise, times, levels."""
    training = build_training(config)
    module: Any = training.module
    told: list[Tensor] = []

    def watched(*given: Tensor) -> Tensor:
        told.extend(given)
        return torch.zeros(len(given[0]), requires_grad=True)

    module.decoder.forward = watched
    (batch,) = training.load(0).with_totals()
    training.losses(batch)
    return training, batch, told


def test_predicted_vectors_are_what_the_llm_writes_for_a_caption_of_the_picture(runs: Path, predicting: Any) -> None:
    _, batch, told = step_of(predicting("diffusion.predicted=1"))
    generator = Generator.from_pretrained(runs / "stage3" / "model", "cpu")
    reader = open_dataset("fixture/train")
    rows = {reader.words(index).key: index for index in range(len(reader))}
    leave = generator.pisces.bridge.statistics.destandardize
    for (_, key), vectors in zip(batch.draws, told[1], strict=True):
        index = rows[key]
        caption = caption_of(reader.words(index), index)
        torch.testing.assert_close(vectors, leave(generator.vectors([caption]))[0], rtol=1e-4, atol=1e-4)


def test_the_decoder_is_told_the_level_that_it_is_told_when_it_draws(predicting: Any) -> None:
    *_, told = step_of(predicting("diffusion.predicted=1", "model.decoder.noise_level=0.3", "diffusion.noisy=1"))
    torch.testing.assert_close(told[4], torch.full((12,), 0.3))


def test_the_others_keep_true_vectors(predicting: Any) -> None:
    training, batch, told = step_of(predicting("diffusion.predicted=0.5", "model.decoder.noise_level=0.3"))
    is_true = (told[1] == training.module.vectors(batch)).flatten(1).all(1)
    is_predicted = (told[1] == batch.predicted_BME).flatten(1).all(1)
    assert torch.equal(is_true, ~is_predicted) and 0 < int(is_predicted.sum()) < 12
    torch.testing.assert_close(told[4], 0.3 * is_predicted.float())


def test_captions_of_a_picture_take_turns() -> None:
    sample = Sample("s", (), short="a cat", detailed="A large cat.", more_captions=("the cat",))
    assert [caption_of(sample, row) for row in range(4)] == ["a cat", "the cat", "A large cat.", "a cat"]


def test_other_words_or_another_llm_make_it_another_store(runs: Path, predicting: Any, tmp_path: Path) -> None:
    config = predicting()
    reader = open_dataset("fixture/train")
    found = fingerprints(config)
    key = store_keys(config, reader, found)["predicted"]
    assert key["pictures"] == reader.digest != store_keys(config, reader, found)["generation"]["pictures"]
    other = config.model_copy(update={"model": config.model.model_copy(update={"start": str(runs / "stage2/model")})})
    assert fingerprints(other)["predicted"].weights != found["predicted"].weights
    with pytest.raises(FeatureError, match="no predicted features"):
        build_training(other)
    guided = shutil.copytree(config.model.start, tmp_path / "guided")
    card = json.loads((guided / "config.json").read_text())
    card["model"]["bridge"]["vector_guidance"] = 1.5
    (guided / "config.json").write_text(json.dumps(card))
    other = config.model_copy(update={"model": config.model.model_copy(update={"start": str(guided)})})
    again = fingerprints(other)["predicted"]
    assert again.weights == found["predicted"].weights
    assert again.preprocessing == {**found["predicted"].preprocessing, "vector_guidance": 1.5}


def test_without_an_llm_it_is_refused(runs: Path, predicting: Any) -> None:
    with pytest.raises(ConfigError, match=r"diffusion\.predicted: model\.start = .*decoder.* has no LLM"):
        build_training(predicting(f"model.start={runs / 'decoder' / 'model'}"))
