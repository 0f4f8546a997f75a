"""How the judges learn: pictures composed for them alone, and a small loop.

Their pictures are wilder than the scenes that models train on: none to five things of any style and size anywhere on
any ground, shapes that are half one thing and half another, and blots, which are nothing; then worn by blur, noise and
shifted colors, as drawings are. So a judge does not learn which scenes are likely, and does not take a blot for a cat.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFilter
from PIL.Image import Image
from torch import Tensor, nn

from open_pisces.data.order import stream
from open_pisces.datasets.scenes.composer import Cutouts
from open_pisces.datasets.scenes.layout import SIZE, Thing, vocabulary
from open_pisces.eval.scenes.judge import (
    COLORS,
    GRID,
    NETWORKS,
    STRIDE,
    TwoStage,
    at_cells,
    boxes,
    classes,
    cut,
    peaks,
)

MOST_OBJECTS = 5
SIDES = (14, 48)
"""Longer side of an object in pixels; fewer objects may be larger."""
CHIMERAS = 0.08
"""Share of objects that are half of one and half of another."""
BLOTS = 0.15
"""Share of pictures with a blot."""
CLOSE = 0.3
"""Share of pictures whose objects may touch."""


class Pictures(NamedTuple):
    """Composed pictures and what is in them; an unused place of the K = `MOST_OBJECTS` has class -1."""

    pixels_NHWC: np.ndarray
    box_NK4: np.ndarray
    class_NK: np.ndarray
    color_NK: np.ndarray
    """-1 where a drawing has no single color."""


# ---------------------------------------------------------------------------------------------------- pictures


def compose(cutouts: Cutouts, count: int, seed: int) -> Pictures:
    """``count`` pictures; picture i depends on (seed, i) alone."""
    kept = Pictures(
        np.zeros((count, SIZE, SIZE, 3), np.uint8),
        np.zeros((count, MOST_OBJECTS, 4), np.float32),
        np.full((count, MOST_OBJECTS), -1, np.int64),
        np.full((count, MOST_OBJECTS), -1, np.int64),
    )
    for i in range(count):
        picture, objects = _picture(cutouts, stream(seed, "judge", "picture", i))
        kept.pixels_NHWC[i] = np.asarray(picture)
        for k, (thing, box) in enumerate(objects):
            kept.box_NK4[i, k] = box
            kept.class_NK[i, k] = classes().index(thing.concept)
            kept.color_NK[i, k] = COLORS.index(thing.colour) if thing.colour in COLORS else -1
    return kept


Placed = tuple[Thing, tuple[int, int, int, int]]


def _picture(cutouts: Cutouts, rng: np.random.Generator) -> tuple[Image, list[Placed]]:
    """One picture and its objects; chimeras and blots are on it, but not among them."""
    grounds = list(vocabulary().backgrounds.values())
    ground = np.array(grounds[int(rng.integers(len(grounds)))]) + rng.integers(-12, 13, 3)
    picture = Pillow.new("RGB", (SIZE, SIZE), tuple(int(c) for c in ground.clip(0, 255)))
    # Mostly one to four, as captions ask; some none, so that nothing can be answered with nothing.
    number = int(rng.choice(MOST_OBJECTS + 1, p=(0.04, 0.34, 0.24, 0.16, 0.16, 0.06)))
    together = rng.random() < 0.5  # several of one kind, as counts are
    # Drawings of small models touch; scenes never do.
    gap = -4 if rng.random() < CLOSE else 1
    taken: list[tuple[int, int, int, int]] = []
    objects: list[Placed] = []
    if rng.random() < BLOTS:
        taken.append(_blot(picture, rng))
    first = style, thing = _any(cutouts, rng)
    most = min(SIDES[1], (48, 48, 34, 28, 27, 24)[number])
    side = int(rng.integers(SIDES[0], most))
    for _ in range(number):
        if not together:
            style, thing = _any(cutouts, rng)
            side = int(rng.integers(SIDES[0], most))
        drawing = cutouts.fitted(*(first if together else (style, thing)), side)
        chimera = rng.random() < CHIMERAS
        if chimera:
            drawing = _halves(drawing, cutouts.fitted(*_any(cutouts, rng), side), rng)
        box = _place(drawing.size, taken, gap, rng)
        if box is None:
            continue
        taken.append(box)
        picture.paste(drawing, box[:2], drawing)
        if not chimera:
            objects.append(((first if together else (style, thing))[1], box))
    return picture, objects


def _any(cutouts: Cutouts, rng: np.random.Generator) -> tuple[str, Thing]:
    """A thing in a style that draws it; the shapes' many colors count as a fifth."""
    styles = sorted(cutouts.words)
    words = vocabulary()
    while True:
        style = styles[int(rng.integers(len(styles)))]
        some = words.shapes if rng.random() < 0.25 else words.objects
        thing = some[int(rng.integers(len(some)))]
        if cutouts.has(style, thing):
            return style, thing


def _place(
    size: tuple[int, int], taken: Sequence[tuple[int, ...]], gap: int, rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """A box of that size inside the picture, at least ``gap`` pixels from the others; None if there is no room."""
    for _ in range(20):
        left, top = (int(rng.integers(0, SIZE - side + 1)) for side in size)
        box = (left, top, left + size[0], top + size[1])
        if all(
            box[2] + gap <= other[0] or other[2] + gap <= box[0] or box[3] + gap <= other[1] or other[3] + gap <= box[1]
            for other in taken
        ):
            return box
    return None


def _halves(one: Image, other: Image, rng: np.random.Generator) -> Image:
    """A drawing whose left or upper half is of one thing and the rest of another, or a mixture of both."""
    other = other.resize(one.size)
    if rng.random() < 0.5:
        return Pillow.blend(one, other, 0.5)
    width, height = one.size
    box = (width // 2, 0, width, height) if rng.random() < 0.5 else (0, height // 2, width, height)
    joined = one.copy()
    joined.paste(other.crop(box), box)
    return joined


def _blot(picture: Image, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a blot of two colors, neither round nor square, and say where it is."""
    side = int(rng.integers(10, 34))
    left, top = (int(rng.integers(0, SIZE - side)) for _ in range(2))
    layer = Pillow.new("RGB", (side, side), tuple(int(c) for c in rng.integers(0, 256, 3)))
    mask = Pillow.new("L", (side, side), 0)
    for draw, fills in ((ImageDraw.Draw(layer), None), (ImageDraw.Draw(mask), 255)):
        spots = stream(int(rng.integers(2**31)), "blot") if fills is None else None
        for _ in range(6 if fills is None else 4):
            a, b = (rng if spots is None else spots).integers(0, side, (2, 2))
            box = (*np.minimum(a, b).tolist(), *(np.maximum(a, b) + 2).tolist())
            draw.ellipse(box, fill=fills if fills else tuple(int(c) for c in (spots or rng).integers(0, 256, 3)))
    picture.paste(layer.filter(ImageFilter.GaussianBlur(1)), (left, top), mask.filter(ImageFilter.GaussianBlur(1)))
    return (left, top, left + side, top + side)


def wear(pixels_BCHW: Tensor, rng: np.random.Generator) -> Tensor:
    """A batch as imperfect decoders might have drawn it; a quarter of the pictures stay as they are.

    Lines bent by up to about two pixels, edges blurred (half of the pictures down to every other pixel), blotches and
    grain, lighter or darker colors: what small decoders do to pictures, but none of theirs, so that a judge favours no
    model.
    """
    B = len(pixels_BCHW)
    side = pixels_BCHW.shape[-1]

    def some(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal((B, *shape), np.float32))

    def share() -> Tensor:
        return torch.from_numpy(rng.random((B, 1, 1, 1), np.float32))

    bend = F.interpolate(some(2, 6, 6), size=(side, side), mode="bicubic") * share() * 1.6 / side
    steps = (torch.arange(side) + 0.5) / side * 2 - 1
    grid = torch.stack([steps.expand(side, side), steps[:, None].expand(side, side)], -1) + bend.permute(0, 2, 3, 1)
    x = F.grid_sample(pixels_BCHW, grid, padding_mode="border", align_corners=False)
    coarse = F.interpolate(F.avg_pool2d(x, 2), size=(side, side), mode="bilinear")
    x = torch.where(share() < 0.5, x, coarse)
    amount = share()
    x = (1 - amount) * x + amount * _blurred(x)
    x = x + F.interpolate(some(3, 16, 16), size=(side, side), mode="bilinear") * share() * 0.07
    x = x + some(3, side, side) * share() * 0.05
    x = x * (1 + 0.06 * some(3, 1, 1)) + 0.02 * some(3, 1, 1)
    return torch.where(share() < 0.75, x, pixels_BCHW).clamp(0, 1)


def _blurred(x_BCHW: Tensor) -> Tensor:
    """Each channel under a 5 x 5 binomial window (a deviation of one pixel)."""
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    x = F.pad(x_BCHW, (2, 2, 2, 2), mode="replicate")
    x = F.conv2d(x, kernel.view(1, 1, 1, 5).repeat(3, 1, 1, 1), groups=3)
    return F.conv2d(x, kernel.view(1, 1, 5, 1).repeat(3, 1, 1, 1), groups=3)


# ------------------------------------------------------------------------------------------------------ training


class Wanted(NamedTuple):
    """What the maps should be, and where each object counts."""

    heat_BHW: Tensor
    raw_BHW4: Tensor
    index_BHW: Tensor
    """Which of the K objects a cell belongs to; -1 for none."""


def wanted(box_BK4: Tensor, class_BK: Tensor) -> Wanted:
    """Targets on the grid: a hill around each middle; the cells near the top of a hill learn its object's box."""
    cells = (torch.arange(GRID) + 0.5) * STRIDE
    x, y = ((box_BK4[..., :2] + box_BK4[..., 2:]) / 2).unbind(-1)
    width, height = (box_BK4[..., 2:] - box_BK4[..., :2]).unbind(-1)
    spread = (torch.minimum(width, height) / 6).clamp_min(2.0)[..., None, None]
    apart = (cells[None, None, None] - x[..., None, None]) ** 2 + (cells[None, None, :, None] - y[..., None, None]) ** 2
    hill = torch.exp(-apart / (2 * spread**2)) * (class_BK >= 0)[..., None, None]
    # The cell in which a middle lies is a top, wherever in the cell it lies.
    inside = (apart == apart.flatten(2).amin(-1)[..., None, None]) & (class_BK >= 0)[..., None, None]
    hill = torch.where(inside, 1.0, hill)
    heat, index = hill.max(1)
    across = (x[..., None, None] / STRIDE - (torch.arange(GRID) + 0.5)).expand(-1, -1, GRID, -1)
    down = (y[..., None, None] / STRIDE - (torch.arange(GRID) + 0.5)[:, None]).expand(-1, -1, -1, GRID)
    sides = torch.log(torch.stack([width, height], -1).clamp_min(1) / (SIZE / 2))
    every = torch.cat([torch.stack([across, down], -1), sides[:, :, None, None].expand(-1, -1, GRID, GRID, -1)], -1)
    mine = every.gather(1, index[:, None, :, :, None].expand(-1, 1, -1, -1, 4))[:, 0]
    return Wanted(heat, mine, torch.where(heat > 0.4, index, -1))


def found_loss(maps: dict[str, Tensor], want: Wanted) -> Tensor:
    """CenterNet's focal loss of the middles, and the absolute error of the boxes, weighted by the hills."""
    logit = maps["middle"][:, 0]
    heat = want.heat_BHW
    chance = logit.sigmoid()
    top = heat == 1
    # CenterNet's exponents: alpha = 2, beta = 4.
    hit = (1 - chance) ** 2 * F.logsigmoid(logit)
    miss = (1 - heat) ** 4 * chance**2 * F.logsigmoid(-logit)
    focal = -torch.where(top, hit, miss).sum() / top.sum().clamp_min(1)
    weight = torch.where(want.index_BHW >= 0, heat, 0.0)
    error = (maps["box"].permute(0, 2, 3, 1) - want.raw_BHW4).abs().sum(-1)
    return focal + (error * weight).sum() / weight.sum().clamp_min(1)


def _named_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy where there is a target."""
    # Smoothed a little, so that confidences stay below 1 and can be told apart by a threshold.
    loss = F.cross_entropy(logits, target, ignore_index=-1, reduction="none", label_smoothing=0.02)
    weight = (target >= 0).float() * (1.0 if weight is None else weight)
    return (loss * weight).sum() / weight.sum().clamp_min(1)


def one_stage_loss(network: nn.Module, pixels: Tensor, box: Tensor, class_: Tensor, color: Tensor) -> Tensor:
    """Everything at the cells where it should be found."""
    maps = network.maps(pixels)  # type: ignore[operator]
    want = wanted(box, class_)
    index = want.index_BHW.clamp_min(0).flatten(1)
    total = found_loss(maps, want)
    for name, truth in (("classes", class_), ("colours", color)):
        target = torch.where(want.index_BHW >= 0, truth.gather(1, index).view_as(want.index_BHW), -1)
        total = total + _named_loss(maps[name], target, want.heat_BHW)
    return total


def two_stage_loss(network: nn.Module, pixels: Tensor, box: Tensor, class_: Tensor, color: Tensor) -> Tensor:
    """The boxes; then names of shaken true boxes, and of places where nothing (whole) is."""
    assert isinstance(network, TwoStage)
    maps = network.maps(pixels)
    want = wanted(box, class_)
    picture, place = torch.nonzero(class_ >= 0, as_tuple=True)
    true = box[picture, place]
    side = (true[:, 2:] - true[:, :2]).repeat(1, 2)
    # The first stage's boxes are off by about this much.
    shaken = true + side * 0.06 * torch.randn_like(true)
    empty_picture, empty = _empty(maps, box, class_)
    crops = cut(pixels, torch.cat([shaken, empty]), torch.cat([picture, empty_picture]))
    named, colors = network.name(crops)
    none = torch.zeros(len(empty), dtype=torch.long)
    names = torch.cat([class_[picture, place] + 1, none])
    hues = torch.cat([color[picture, place], none - 1])
    return found_loss(maps, want) + _named_loss(named, names) + _named_loss(colors, hues)


@torch.no_grad()
def _empty(maps: dict[str, Tensor], box: Tensor, class_: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes that the first stage proposes where no object is: its surest wrong one in each picture, if it has any."""
    score, cell = peaks(maps["middle"].sigmoid())
    proposed = boxes(at_cells(maps["box"], cell), cell)
    middle = (proposed[..., :2] + proposed[..., 2:]) / 2
    inside = (middle[:, :, None] > box[:, None, :, :2]) & (middle[:, :, None] < box[:, None, :, 2:])
    on_one = (inside.all(-1) & (class_ >= 0)[:, None]).any(-1)
    score = torch.where(on_one, -1.0, score)
    best = score.argmax(1)
    some = torch.nonzero(score.gather(1, best[:, None])[:, 0] > 0.02)[:, 0]
    return some, proposed[some, best[some]]


LOSSES: dict[str, Callable[..., Tensor]] = {"one-stage": one_stage_loss, "two-stage": two_stage_loss}


def train(
    kind: str,
    cutouts: Cutouts,
    seed: int,
    steps: int,
    pictures: int,
    batch_size: int = 64,
    lr: float = 2e-3,
    say: Callable[[str], None] = print,
) -> nn.Module:
    """Train one judge from nothing; the same arguments give the same judge on the same machine.

    Args:
        kind: ``one-stage`` or ``two-stage``.
        cutouts: what pictures are made of; all styles are used, for a judge has to know them all.
        seed: of pictures, weights and order.
        steps: of AdamW, with a warm-up and a cosine.
        pictures: composed beforehand, walked through again and again, worn afresh each time.
    """
    torch.manual_seed(seed)
    network = NETWORKS[kind]()
    made = compose(cutouts, pictures, seed)
    # Not train.optim's: that decays no biases and begins its cosine after the warm-up, so the judges in the package
    # could not be made again.
    optimizer = torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)
    warm = max(1, steps // 20)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / warm) * (0.5 + 0.5 * np.cos(np.pi * s / steps))
    )
    start = time.time()
    mean = 0.0
    for step, indices in enumerate(_walk(pictures, batch_size, steps, seed)):
        rng = stream(seed, "judge", "wear", step)
        pixels = torch.from_numpy(made.pixels_NHWC[indices]).permute(0, 3, 1, 2).float() / 255
        pixels = wear(pixels, rng)
        truth = (torch.from_numpy(part[indices]) for part in made[1:])
        with torch.autocast("cpu", torch.bfloat16):
            loss = LOSSES[kind](network, pixels, *truth)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        mean += (loss.item() - mean) / min(step + 1, 50)
        if (step + 1) % 100 == 0:
            say(f"{kind} {step + 1}/{steps}: loss {mean:.3f}, {(time.time() - start) / (step + 1):.3f} s a step")
    return network.eval()


def _walk(pictures: int, batch_size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of each step's pictures: shuffled anew each time through."""
    left: np.ndarray = np.zeros(0, np.int64)
    epoch = 0
    for _ in range(steps):
        if len(left) < batch_size:
            left = np.concatenate([left, stream(seed, "judge", "order", epoch).permutation(pictures)])
            epoch += 1
        yield left[:batch_size]
        left = left[batch_size:]
