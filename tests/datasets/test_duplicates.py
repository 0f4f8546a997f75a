"""Copies of pictures: the hash moves little, the index finds what comparing all with all finds."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from open_pisces.datasets.duplicates import Appearance, CopyCounter, NearIndex, appearance_of


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    """Smooth random blobs of color."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def file_of(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_the_same_file_counts_as_exact_and_the_same_look_as_near() -> None:
    copies = CopyCounter()
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")  # one hash, two colors
    copies.add([(10, 1), (10, 2)], (red, blue))
    copies.add([(10, 1), (11, 1)], (red, blue))
    assert (copies.exact, copies.near) == (1, 1)


def test_the_hash_does_not_depend_on_size_or_encoding_much() -> None:
    for seed in range(20):
        one = picture(seed, 128, 96)
        for copy in (file_of(one, "JPEG", quality=60), file_of(one.resize((64, 48)), "PNG")):
            bits = appearance_of(one).hash ^ appearance_of(Image.open(io.BytesIO(copy)).convert("RGB")).hash
            assert bits.bit_count() <= 4
    hashes = [appearance_of(picture(seed)).hash for seed in range(40)]
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) > 8


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 16))
def test_bands_find_what_comparing_all_with_all_finds(data: st.DataObject, distance: int) -> None:
    number = st.integers(0, 2**64 - 1)
    centre = data.draw(number)
    flips = st.sets(st.integers(0, 63), max_size=distance + 2).map(lambda bits: sum(1 << bit for bit in bits))
    hashes = data.draw(st.lists(st.one_of(number, flips.map(lambda bits: centre ^ bits)), max_size=20))
    index = NearIndex(distance)
    for one in hashes:
        index.add(Appearance(one, np.zeros(48, np.uint8)))
    expected = [place for place, one in enumerate(hashes) if (one ^ centre).bit_count() <= distance]
    assert index.near(centre).tolist() == expected


@pytest.mark.parametrize("distance", range(1, 17))
def test_bands_find_differences_that_are_spread_evenly(distance: int) -> None:
    index = NearIndex(distance)
    for offset in range(64 // distance):  # one bit in each of `distance` equal parts: one band fewer would miss these
        bits = sum(1 << 64 * part // distance + offset for part in range(distance))
        index.add(Appearance(bits, np.zeros(48, np.uint8)))
    assert len(index.near(0)) == len(index) == 64 // distance


def test_an_index_grows_and_looks_at_colors() -> None:
    index, grey = NearIndex(2), np.full(48, 100, np.uint8)
    assert Appearance(0, grey) not in index
    for one in range(1500):
        index.add(Appearance(one << 20, grey))
    assert len(index) == 1500 and len(index.near(1499 << 20)) > 1
    assert Appearance(1499 << 20 | 3, grey + 16) in index and Appearance(1499 << 20 | 3, grey + 17) not in index
    assert Appearance(1499 << 20 | 0b1110000 << 40, grey) not in index
