"""The feature cache: computed once, equal to encoding on the fly, and never read when anything has changed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import build_pisces

from open_pisces.batch import Sample
from open_pisces.config import RunConfig
from open_pisces.data.features import FeatureError, FeatureStore, picture_rows, store_folder
from open_pisces.data.order import Mixture
from open_pisces.data.shards import DamagedSample, ShardReader, open_dataset
from open_pisces.datasets.indexing import index_folder
from open_pisces.datasets.shard_writer import ShardWriter
from open_pisces.factory import encode as encoding
from open_pisces.factory.encode import encode
from open_pisces.factory.encoders import fingerprints, load_encoders, store_keys
from open_pisces.recipe import load_config
from open_pisces.settings import ConfigError
from open_pisces.train.loop import train
from open_pisces.train.objectives import base, build_training
from open_pisces.train.objectives.base import get_features, get_tokenizer
from open_pisces.train.world import World


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano model folder to train from."""
    folder = tmp_path_factory.mktemp("start") / "model"
    config = load_config("nano/stage1", ["model.start=null"])
    torch.manual_seed(0)
    tokenizer = get_tokenizer(config)
    build_pisces(config.model, len(tokenizer)).save_pretrained(folder, tokenizer)
    return folder


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of 30 scenes (one without, one with two pictures) in a data folder of its own."""
    monkeypatch.setenv("PISCES_DATA", str(tmp_path / "data"))
    reader = open_dataset("fixture/train")
    with ShardWriter(tmp_path / "data" / "small", 8) as writer:
        for index in range(30):
            sample = reader[index]
            images = {3: (), 4: (*sample.images, reader[50].images[0])}.get(index, sample.images)
            writer.write(replace(sample, images=images))
    return tmp_path / "data" / "small"


def recipe(start: Path, stage: str = "stage1", *over: str, features: str = "float32") -> RunConfig:
    sources = "data.sources=[{path: small, tasks: {generate_short: 1.0, caption_detailed: 1.0}}]"
    if stage == "decoder":
        sources = "data.sources=[{path: small}]"
    settings = [
        f"model.start={start}",
        sources,
        "data.max_bad=1.0",
        f"data.features='{features}'",
        "train.batch_size=8",
    ]
    return load_config(f"nano/{stage}", [*settings, *over])


def test_cached_features_are_the_encoders(start: Path, small: Path) -> None:
    config = recipe(start)
    done = encode(config, batch_size=7)
    assert [(d["kind"], d["pictures"], d["unreadable"], d["was_there"]) for d in done] == [
        ("generation", 30, 0, False), ("understanding", 30, 0, False),
    ]  # fmt: skip
    assert all(d["was_there"] for d in encode(config))
    (store,) = get_features(config, Mixture(config.data, 0), World(torch.device("cpu")))
    reader, encoders = ShardReader(small), load_encoders(config)
    from open_pisces.data.images import generation_bytes, understanding_bytes

    for kind, cut in (("generation", generation_bytes), ("understanding", understanding_bytes)):
        encoder = encoders[kind]  # type: ignore[index]
        for index in (0, 4, 29):
            pixels = np.stack([cut(image, encoder.image_size) for image in reader[index].images])
            with torch.no_grad():
                expected = encoder(torch.from_numpy(pixels)).numpy()
            assert np.allclose(np.stack(store.read(kind, index)), expected, atol=1e-5)  # type: ignore[arg-type]
            assert store.shape(kind) == expected.shape[1:]  # type: ignore[arg-type]
        assert store.read(kind, 3) == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(("stage", "over"), [("stage1", ()), ("stage1", ("data.row_length=512",)), ("decoder", ())])
def test_a_training_on_cached_features_is_the_one_that_encodes(
    start: Path, small: Path, tmp_path: Path, stage: str, over: tuple[str, ...]
) -> None:
    curves = []
    for name, features in (("fly", ""), ("cache", "float32")):
        config = recipe(start, stage, *over, f"out={tmp_path / name}", "train.steps=6", features=features)
        if features:
            encode(config)
        folder = train(config, probes=())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curves.append({k: v for k, v in rows[-1].items() if k in ("text", "vectors", "diffusion", "norm")})
    assert curves[0] == pytest.approx(curves[1], rel=2e-3) and min(curves[0].values()) > 0


def test_cached_steps_decode_no_picture_and_call_no_encoder(
    start: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(start)
    encode(config)
    training = build_training(config)
    monkeypatch.setattr(ShardReader, "pictures", lambda *_: pytest.fail("a picture was read"))
    for name in ("understanding_encoder", "generation_encoder"):
        monkeypatch.setattr(getattr(training.module, name), "forward", lambda *_: pytest.fail("an encoder was called"))
    losses = training.losses(training.load(0).with_totals()[0])
    assert losses.loss.item() > 0


def test_conversations_train_from_the_cache_as_without_it(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PISCES_DATA", str(tmp_path / "data"))
    turns = (
        {"role": "user", "content": [{"image": 1}, "And this?", {"image": 0}]},
        {"role": "assistant", "content": ["Yes."]},
    )
    scenes = open_dataset("fixture/train")
    with ShardWriter(tmp_path / "data" / "small") as writer:
        for number in range(8):
            pair = (scenes[number].images[0], scenes[number + 8].images[0])
            writer.write(Sample(f"c{number}", pair, conversation=turns))
    sources = "data.sources=[{path: small, tasks: {conversation: 1.0}}]"
    losses = []
    for features in ("", "float32"):
        config = recipe(start, "stage1", sources, features=features)
        if features:
            encode(config)
        training = build_training(config)
        step = training.load(0)
        assert not step.skipped
        losses.append(sum(training.losses(batch).loss.item() for batch in step.with_totals()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_one_kind_may_be_cached_alone(start: Path, small: Path, tmp_path: Path) -> None:
    over = ("data.feature_kinds=[generation]", f"out={tmp_path / 'run'}", "train.steps=2")
    config = recipe(start, "stage1", *over)
    assert [d["kind"] for d in encode(config)] == ["generation"]
    batches = build_training(config).load(0).batches
    assert all(b.understanding_features_BNE is None and b.generation_features_BME is not None for b in batches)
    assert any(len(b.understanding_pixels_BCHW) for b in batches)
    assert not any(len(b.generation_pixels_BCHW) for b in batches)
    train(config, probes=())


class Second(World):
    """The second of two ranks, which gets what the first has sent."""

    sent: Any = None

    def broadcast_object(self, value: Any) -> Any:
        assert value is None
        return type(self).sent


def test_only_the_first_rank_hashes_encoders_and_its_error_is_everybodys(
    start: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(start)
    encode(config)
    mixture = Mixture(config.data, 0)
    (first,) = get_features(config, mixture, World(torch.device("cpu")))
    second = Second(torch.device("cpu"), rank=1, ranks=2)
    monkeypatch.setattr(Second, "sent", fingerprints(config))
    monkeypatch.setattr(base, "fingerprints", lambda config: pytest.fail("an encoder was loaded"))
    (store,) = get_features(config, mixture, second)
    assert store.keys == first.keys and np.array_equal(store.read("generation", 7), first.read("generation", 7))
    monkeypatch.setattr(Second, "sent", ConfigError("no encoder"))
    with pytest.raises(ConfigError, match="no encoder"):
        get_features(config, mixture, second)


# ------------------------------------------------------------------------------------------------ stale stores


def refused(config: RunConfig) -> str:
    with pytest.raises(FeatureError, match="run `pisces data encode RECIPE`") as caught:
        build_training(config)
    return str(caught.value)


def test_whatever_the_numbers_depend_on_makes_another_store(start: Path, small: Path, tmp_path: Path) -> None:
    config = recipe(start)
    assert "no generation features" in refused(config) and "there is a store" not in refused(config)
    encode(config)
    build_training(config)
    assert "of other dtype" in refused(recipe(start, features="float16"))
    assert "of other preprocessing" in refused(recipe(start, "stage1", "model.generation_mean=[0.4,0.5,0.5]"))
    other = tmp_path / "other"
    shutil.copytree(start, other)
    encoders = load_encoders(config)
    before = fingerprints(config, encoders)
    tower = encoders["generation"].encoder
    tower.config = tower.config.model_copy(update={"activation": "quick_gelu"})  # no tensor differs, every output does
    encoders["understanding"].encoder.tower.config.hidden_act = "relu"
    after = fingerprints(config, encoders)
    assert all(before[kind] != after[kind] and before[kind].weights == after[kind].weights for kind in before)
    path = other / "generation_encoder"
    change_weights(path)
    assert "of other encoder" in refused(recipe(other))
    with ShardWriter(small, 8) as writer:
        for sample in [ShardReader(small)[i] for i in range(29)] + [
            Sample("new", open_dataset("fixture/train")[77].images)
        ]:
            writer.write(sample)
    assert "of other pictures" in refused(config)


def change_weights(part: Path) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = part.glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file, {"format": "pt"})
    card = part.parent / "config.json"
    described = json.loads(card.read_text())
    described["parts"].pop("generation_encoder", None)  # else the folder itself says that its weights are not its own
    card.write_text(json.dumps(described))


def test_new_words_keep_the_store(start: Path, small: Path) -> None:
    config = recipe(start)
    encode(config)
    samples = [replace(ShardReader(small)[i], short=f"other {i}") for i in range(30)]
    with ShardWriter(small, 8) as writer:
        for sample in samples:
            writer.write(sample)
    build_training(config)


def test_an_interrupted_encoding_goes_on(start: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(start, "stage1", "data.feature_kinds=[generation]")
    monkeypatch.setattr(encoding, "FLUSH", 1)
    whole = encoding._pictures
    calls: list[int] = []
    monkeypatch.setattr(encoding, "_pictures", lambda r, s, *rest: calls.append(s) or _maybe(whole, r, s, rest, calls))
    with pytest.raises(KeyboardInterrupt):
        encode(config, batch_size=8)
    (key,) = store_keys(config, ShardReader(small), fingerprints(config)).values()
    assert not store_folder(key).exists() and "no generation features" in refused(config)
    encode(config, batch_size=8)
    assert calls == [0, 8, 16, 16, 24]
    build_training(config)
    found = (store_folder(key) / "features.npy").read_bytes()
    shutil.rmtree(store_folder(key))
    monkeypatch.setattr(encoding, "FLUSH", 64)  # all in one range
    encode(config, batch_size=8)
    assert (store_folder(key) / "features.npy").read_bytes() == found


def _maybe(whole: Any, reader: Any, start: int, rest: tuple[Any, ...], calls: list[int]) -> Any:
    if calls.count(16) == 1 and start == 16:
        raise KeyboardInterrupt
    return whole(reader, start, *rest)


def test_a_picture_that_cannot_be_read_is_skipped_in_training(start: Path, small: Path) -> None:
    path = small / "00001.tar"
    reader = ShardReader(small)
    offset, size, *_ = reader._members_of(9).tolist()[0]
    content = bytearray(path.read_bytes())
    content[offset + 20 : offset + size] = bytes(size - 20)
    path.write_bytes(content)
    index_folder(small)
    config = recipe(start)
    assert {d["unreadable"] for d in encode(config)} == {1}
    reader = ShardReader(small)
    store = FeatureStore(reader, store_keys(config, reader, fingerprints(config)))
    with pytest.raises(DamagedSample, match="could not be read when it was encoded"):
        store.read("generation", 9)
    assert store.read("generation", 10)
    assert int(picture_rows(reader)[-1]) == 30
    load = build_training(config).load
    assert reader.key(9) in {skip.key for step in range(8) for skip in load(step).skipped}


def test_what_has_no_use_for_a_cache_is_refused(start: Path, small: Path) -> None:
    with pytest.raises(ConfigError, match="data.features is not set"):
        encode(recipe(start, features=""))
    with pytest.raises(ConfigError, match="for frozen encoders"):
        encode(recipe(start, "gen_clip"))
    with pytest.raises(ConfigError, match="for frozen encoders"):
        encode(recipe(start, "stage1", "train.freeze=[generation_encoder]"))
    with pytest.raises(ConfigError, match="holds no generation_encoder"):
        encode(recipe(start, "stage1", "model.start=null"))
