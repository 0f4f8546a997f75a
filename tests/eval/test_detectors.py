"""Mask2Former and CLIP as GenEval's detector: tiny twins with random weights, masks and crops worked by the pixel."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from PIL.Image import Image
from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from open_pisces.eval.drawing.detection import Detection, DetectorError
from open_pisces.eval.drawing.judged_run import detect, items_of, rows_name, score_run
from open_pisces.eval.drawing.mask2former import (
    GRAY,
    ColorReader,
    Mask2FormerClip,
    Segmenter,
    class_names,
    cut_out,
    instances,
    mask_box,
    prepare,
)
from open_pisces.eval.drawing.official_layout import GenEvalOfFolder
from open_pisces.eval.drawing.prompts import PromptSetError, generate, tables, to_row
from open_pisces.eval.run import Manifest, RunFolder

# COCO's 80 classes as COCO spells them, and where darknet, and with it the published Mask2Former, spells otherwise.
COCO = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell
phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"""
COCO_NAMES = " ".join(COCO.split()).split(", ")
DARKNET = {"motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant"}
DARKNET |= {"dining table": "diningtable", "tv": "tvmonitor"}
IN_GENEVAL = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
LABELS = ("person", "motorbike", "sofa")


def small_mask2former() -> Mask2FormerConfig:
    """Random weights, real classes: about 100,000 parameters."""
    swin = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    widths = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    inner = dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 16)
    depths = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 6}
    return Mask2FormerConfig(backbone_config=swin, **widths, **inner, **depths, id2label=dict(enumerate(LABELS)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a Mask2Former and of a CLIP whose tokenizer knows single characters."""
    root = tmp_path_factory.mktemp("twins")
    torch.manual_seed(0)
    Segmenter(small_mask2former()).save_pretrained(root / "mask2former")
    side = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**side, "vocab_size": 190, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**side, "image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    clip.save_pretrained(root / "clip")
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (root / "clip/vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (root / "clip/merges.txt").write_text("#version: 0.2\n")
    (root / "clip/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return root / "mask2former", root / "clip"


@pytest.fixture(scope="module")
def detector(folders: tuple[Path, Path]) -> Mask2FormerClip:
    return Mask2FormerClip(*folders, device="cpu", floor=0.01, sides=(64, 96), batch_size=2)


def noise(width: int, height: int, seed: int = 0) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Pillow.fromarray(pixels)


# ---------------------------------------------------------------------------------------------------------- classes


def test_all_80_classes_have_genevals_names() -> None:
    expected = tuple(IN_GENEVAL.get(name, name) for name in COCO_NAMES)
    assert len(set(expected)) == 80 and tuple(tables()["classes"]) == expected
    for spelled in (
        COCO_NAMES,
        [DARKNET.get(name, name) for name in COCO_NAMES],
        [name.replace(" ", "_").upper() for name in COCO_NAMES],
        expected,
    ):
        assert class_names(dict(enumerate(spelled))) == expected


@pytest.mark.skipif("PISCES_GENEVAL" not in os.environ, reason="PISCES_GENEVAL names no folder")
def test_all_80_classes_have_the_official_files_names() -> None:
    official = (Path(os.environ["PISCES_GENEVAL"]) / "object_names.txt").read_text().split("\n")[:80]
    assert list(class_names(dict(enumerate(COCO_NAMES)))) == official


def test_labels_are_in_the_order_of_the_outputs_and_others_stay() -> None:
    assert class_names({1: "remote", 0: "heart", 2: "sofa"}) == ("heart", "tv remote", "couch")


# --------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("size", "sides", "inner", "padded"),
    [
        ((50, 40), (64, 96), (64, 80), (64, 96)),  # short side 40 -> 64, x 1.6
        ((40, 50), (64, 96), (80, 64), (96, 64)),
        ((100, 40), (64, 96), (38, 96), (64, 96)),  # the long side is the limit: x 0.96
        ((64, 64), (64, 96), (64, 64), (64, 64)),
        ((512, 512), (800, 1333), (800, 800), (800, 800)),  # as in mmdet's test pipeline
        ((640, 480), (800, 1333), (800, 1067), (800, 1088)),
        ((1000, 300), (800, 1333), (400, 1333), (416, 1344)),
    ],
)
def test_pictures_are_scaled_and_padded(
    size: tuple[int, int], sides: tuple[int, int], inner: tuple[int, int], padded: tuple[int, int]
) -> None:
    pixels, found = prepare(Pillow.new("RGB", size, (255, 0, 51)), *sides)
    assert found == inner and pixels.shape == (3, *padded) and pixels.dtype == np.float32
    assert not pixels[:, inner[0] :].any() and not pixels[:, :, inner[1] :].any()  # zeros after the normalising
    # ImageNet: (1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225
    expected = np.array([2.2489, -2.0357, -0.9156])[:, None, None]
    np.testing.assert_allclose(pixels[:, : inner[0], : inner[1]], np.broadcast_to(expected, (3, *inner)), atol=1e-3)


def test_masks_come_to_lie_on_their_pixels() -> None:
    """A network that saw 32 x 32, of which 32 x 24 are picture, which is 64 x 48; its masks are 8 x 8.

    A cell is 4 x 4 pixels of what was seen and 8 x 8 of the picture. Between a cell of +1000 and one of -1000 the
    enlarged mask crosses 0 on the border of the two, so a band of cells becomes a band of pixels with their borders.
    """
    masks = torch.full((3, 8, 8), -1000.0)
    masks[0, 2:6] = 1000  # rows 16 to 48
    masks[1, :, 4:] = 1000  # columns from 32, cut at 48: the padding is no picture
    masks[2, :, 6:] = 1000  # in the padding alone
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 3.0, 0.0], [5.0, 0.0, 0.0]])
    found = instances(logits, masks, ("cat", "dog"), (32, 32), (32, 24), (64, 48), floor=0.2)
    assert [(d.name, d.box) for d in found] == [("cat", (0, 16, 48, 48)), ("dog", (32, 0, 48, 64))]
    for detection, (left, top, right, bottom) in zip(found, ((0, 16, 48, 48), (32, 0, 48, 64)), strict=True):
        expected = np.zeros((64, 48), dtype=bool)
        expected[top:bottom, left:right] = True
        assert detection.mask is not None and np.array_equal(detection.mask, expected)
        assert detection.box == mask_box(expected)
    # softmax over the classes and "nothing"; the logits inside are so large that the mean probability is 1
    assert found[0].score == pytest.approx(np.exp(4) / (np.exp(4) + 2), abs=1e-4)
    assert found[1].score == pytest.approx(np.exp(3) / (np.exp(3) + 2), abs=1e-4)


def test_confidence_is_the_class_times_the_mask() -> None:
    flat = torch.full((1, 4, 4), 0.5)  # sigmoid(0.5) everywhere
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    found = instances(logits, flat, ("cat", "dog"), (16, 16), (16, 16), (10, 20), floor=0.05)
    total = np.exp(2) + np.exp(1) + 1
    inside = 1 / (1 + np.exp(-0.5))
    assert [d.name for d in found] == ["cat", "dog"]  # a query may stand for several classes
    assert found[0].score == pytest.approx(np.exp(2) / total * inside, abs=1e-5)
    assert found[1].score == pytest.approx(np.exp(1) / total * inside, abs=1e-5)
    assert found[0].box == (0, 0, 20, 10) and found[0].mask is not None and found[0].mask.shape == (10, 20)
    # 0.245 x 0.622 = 0.152: above the floor of the class alone, below that of the product
    assert [d.name for d in instances(logits, flat, ("cat", "dog"), (16, 16), (16, 16), (10, 20), floor=0.2)] == ["cat"]
    assert instances(logits, -flat, ("cat", "dog"), (16, 16), (16, 16), (10, 20), floor=0.0) == []  # empty masks


def test_among_equals_the_later_comes_first() -> None:
    masks = torch.full((3, 4, 4), -9.0)
    for query in range(3):
        masks[query, :, query] = 9
    logits = torch.tensor([[3.0, 0.0, 0.0]] * 3)
    found = instances(logits, masks, ("cat", "dog"), (4, 4), (4, 4), (4, 4), floor=0.5)
    assert len({d.score for d in found}) == 1 and [d.box[0] for d in found] == [2, 1, 0]


def test_a_hundred_pairs_at_most() -> None:
    logits, masks = torch.zeros(60, 3), torch.full((60, 4, 4), 9.0)  # 120 pairs
    assert len(instances(logits, masks, ("cat", "dog"), (4, 4), (4, 4), (4, 4), floor=0.0)) == 100


def test_crops_show_the_object_on_grey() -> None:
    image = noise(20, 12)
    mask = np.zeros((12, 20), dtype=bool)
    mask[3:7, 5:9] = mask[5:10, 8:15] = True
    crop = np.asarray(cut_out(image, Detection("cat", mask_box(mask), 0.9, mask=mask)))
    expected = np.where(mask[..., None], np.asarray(image), np.uint8(0x99))[3:10, 5:15]
    assert mask_box(mask) == (5, 3, 15, 10) and GRAY == (0x99, 0x99, 0x99)
    assert np.array_equal(crop, expected)
    plain = np.asarray(cut_out(image, Detection("cat", (4.5, 2.4, 10.5, 7.6), 0.9)))  # no mask: the box alone
    assert np.array_equal(plain, np.asarray(image)[2:8, 4:10])  # rounded as Pillow's crop does: 4.5 -> 4, 10.5 -> 10


# ---------------------------------------------------------------------------------------------------------- colours


def test_colours_are_the_mean_of_three_texts(folders: tuple[Path, Path]) -> None:
    """Against CLIP's own forward pass, whose embeddings are normalised."""
    reader = ColorReader(folders[1], torch.device("cpu"))
    crop, name = noise(32, 32, 3), "wine glass"
    (found,) = reader.probabilities([crop], [name])
    texts = [
        [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}", f"a photo of a {color} object"]
        for color in found
    ]
    tokens = reader.tokenizer(sum(texts, []), padding=True, return_tensors="pt")
    mean, deviation = np.array([0.4815, 0.4578, 0.4082]), np.array([0.2686, 0.2613, 0.2758])
    pixels = ((np.asarray(crop) / 255 - mean) / deviation).transpose(2, 0, 1)[None].astype(np.float32)
    with torch.no_grad():
        out = reader.clip(**tokens, pixel_values=torch.from_numpy(pixels))
    directions = out.text_embeds.reshape(10, 3, 8).mean(1)
    directions /= directions.norm(dim=-1, keepdim=True)
    expected = (100 * out.image_embeds @ directions.T).softmax(-1)[0].numpy()
    assert list(found) == "red orange yellow green blue purple pink brown black white".split()
    np.testing.assert_allclose(list(found.values()), expected, atol=2e-3)
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)


def test_colours_do_not_depend_on_the_batch(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ColorReader(folders[1], torch.device("cpu"), ("red", "blue"))
    crops, names = [noise(9 + k, 30 - k, k) for k in range(7)], ["cat", "dog", "cat", "cow", "cat", "dog", "cow"]
    monkeypatch.setattr("open_pisces.eval.drawing.mask2former._CROPS", 3)
    together = reader.probabilities(crops, names)
    alone = [reader.probabilities([crop], [name])[0] for crop, name in zip(crops, names, strict=True)]
    assert [list(row) for row in together] == [["red", "blue"]] * 7
    np.testing.assert_allclose([list(r.values()) for r in together], [list(r.values()) for r in alone], atol=1e-5)
    assert reader.probabilities([], []) == [] and reader.directions.cache_info().misses == 3  # one a class


# ----------------------------------------------------------------------------------------------------- the detector


def test_the_twin_detects(detector: Mask2FormerClip) -> None:
    images = [noise(50, 40, k) for k in range(3)] + [noise(30, 70, 9)]
    found = detector.detect(images, [{"couch": 1}, {}, {"couch": 2, "person": 1}, {"person": 99}])
    assert detector.classes == ("person", "motorcycle", "couch") and len(detector.colors) == 10
    assert (detector.threshold, detector.counting_threshold) == (0.3, 0.9)
    assert detector.name == "transformers Mask2Former (mask2former) + CLIP (clip)"
    for image, detections in zip(images, found, strict=True):
        scores = [d.score for d in detections]
        assert 0 < len(detections) <= 18 and scores == sorted(scores, reverse=True) and min(scores) > 0.01
        for d in detections:
            assert d.mask is not None and d.mask.shape == (image.height, image.width) and d.box == mask_box(d.mask)
            assert d.name in detector.classes and (not d.colors or set(d.colors) == set(detector.colors))
    counts = [{name: sum(d.name == name and bool(d.colors) for d in row) for name in detector.classes} for row in found]
    assert counts[0] == {"person": 0, "motorcycle": 0, "couch": 1} and not any(counts[1].values())
    assert counts[2] == {"person": 1, "motorcycle": 0, "couch": 2}
    assert counts[3]["person"] == sum(d.name == "person" for d in found[3])
    couches = [bool(d.colors) for d in found[2] if d.name == "couch"]
    assert couches[:2] == [True, True] and not any(couches[2:])  # of the most confident


def test_batches_change_nothing(folders: tuple[Path, Path], detector: Mask2FormerClip) -> None:
    images = [noise(50, 40, 1), noise(30, 70, 2), noise(50, 40, 3), noise(50, 40, 4), noise(80, 64, 5)]
    wanted = [{"person": 1}] * 5
    together = detector.detect(images, wanted)
    alone = [detector.detect([image], [{"person": 1}])[0] for image in images]
    for one, other in zip(together, alone, strict=True):
        assert [(d.name, d.box) for d in one] == [(d.name, d.box) for d in other]
        np.testing.assert_allclose([d.score for d in one], [d.score for d in other], atol=1e-5)
        assert [d.color for d in one] == [d.color for d in other]
    assert detector.detect([], []) == []


def test_the_network_is_transformers_own(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="transformers' class needs it for its loss")
    torch.manual_seed(1)
    full = Mask2FormerForUniversalSegmentation(small_mask2former()).eval()
    full.save_pretrained(tmp_path)
    ours = Segmenter.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        a, b = full(pixel_values=pixels), ours(pixel_values=pixels)
    assert torch.equal(a.class_queries_logits, b.class_queries_logits)
    assert torch.equal(a.masks_queries_logits, b.masks_queries_logits)


def test_it_judges_a_run(detector: Mask2FormerClip, tmp_path: Path) -> None:
    prompts = generate(detector.classes, detector.colors, 2, colored=detector.classes)
    manifest = Manifest("geneval", "m", "m", {"n": 2, "batch_size": 5})
    run = RunFolder.open(tmp_path / "run", manifest, items_of(prompts))
    pictures = [[noise(40, 40, k), noise(40, 40, k + 50)] for k in range(len(prompts))]
    detect(detector, run, run.items, pictures)
    rows = run.rows(rows_name(detector.name))
    found = score_run(run)
    assert found.n == 24 and found.detector == detector.name and 0 <= (found.score or 0) <= 1
    assert rows[0]["threshold"] == 0.3 and len(rows[0]["pictures"]) == 2
    assert {"class", "box", "score", "colours"} == set(rows[0]["pictures"][0][0])
    (tmp_path / "cat/00000/samples").mkdir(parents=True)
    noise(8, 8, 0).save(tmp_path / "cat/00000/samples/0000.png")
    (tmp_path / "cat/00000/metadata.jsonl").write_text(json.dumps(to_row(generate(["cat"], [], 1)[0])))
    with pytest.raises(PromptSetError, match="does not know the class 'cat'"):
        GenEvalOfFolder(tmp_path / "cat", [detector], n=1).run("m", tmp_path / "b")


# -------------------------------------------------------------------------------------------------------- bad input


def without(name: str, *keys: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        row = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in row.items() if k not in keys}))

    return change


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def lose_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(dict(list(weights.items())[3:]), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "neither a model's folder nor one that the hub gives"),
        (lambda folder: (folder / "model.safetensors").unlink(), "the weights cannot be read"),
        (cut, "the weights cannot be read"),
        (lose_weights, "3 weights are missing"),
        (without("config.json", "model_type"), "neither a model's folder"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_damaged_weights(folders: tuple[Path, Path], tmp_path: Path, which: int, change: Any, says: str) -> None:
    import shutil

    paths = list(folders)
    paths[which] = shutil.copytree(folders[which], tmp_path / "copy")
    change(paths[which])
    with pytest.raises(DetectorError, match=f"copy: {says}.*(Mask2Former|CLIP), or a hub name"):
        Mask2FormerClip(*paths, device="cpu")


def test_weights_that_are_not_there(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for name in (tmp_path / "none", "facebook/mask2former-swin-small-coco-instance"):
        with pytest.raises(DetectorError, match=f"{name}: neither .* or a hub name while online"):
            Mask2FormerClip(name, folders[1], device="cpu")
    with pytest.raises(DetectorError, match="clip: holds a clip, needed is a Mask2Former"):
        Mask2FormerClip(folders[1], folders[1], device="cpu")
    with pytest.raises(DetectorError, match="mask2former: holds a mask2former, needed is a CLIP"):
        Mask2FormerClip(folders[0], folders[0], device="cpu")


def test_a_clip_without_tokenizer(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    bare = shutil.copytree(folders[1], tmp_path / "bare")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(DetectorError, match="bare: no tokenizer .*beside its weights"):
        ColorReader(bare, torch.device("cpu"))


def test_an_unknown_class(detector: Mask2FormerClip) -> None:
    with pytest.raises(DetectorError, match="does not know the class 'cat': it knows 3"):
        detector.detect([noise(20, 20)], [{"cat": 1}])
