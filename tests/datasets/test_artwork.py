"""Artwork packages: checked, joined by code point, rendered. Made-up packages, no network, no npm."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from open_pisces.data.shards import ShardReader
from open_pisces.datasets.scenes import artwork
from open_pisces.datasets.scenes.artwork import ArtworkError, Emoji, Package, fetch
from open_pisces.datasets.scenes.composer import load_cutouts
from open_pisces.datasets.scenes.layout import vocabulary

RED = '<path fill="#f00" d="M0 0h8v16h-8z"/>'  # the left half of a 16 x 16 drawing
EMOJI = [
    {"hexcode": "1F34E", "label": "red apple", "tags": ["apple", "fruit"], "group": 4},
    {"hexcode": "2764-FE0F", "label": "red heart", "tags": ["love"], "group": 0},
    {"hexcode": "1F45E", "label": "man’s shoe", "tags": [], "group": 7},
    {"hexcode": "1F3FB", "label": "light skin tone", "tags": [], "group": 2},
    {"hexcode": "1F1E6", "label": "flag: Ascension Island", "tags": [], "group": 9},
    {"hexcode": "1F1E7", "label": "regional indicator B", "tags": []},
]


def tarball(path: Path, files: dict[str, bytes | object]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def webp(colour: tuple[int, int, int, int]) -> bytes:
    image, buffer = Image.new("RGBA", (32, 32)), io.BytesIO()
    image.paste(colour, (8, 4, 24, 28))
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A download folder with three made-up packages, and the table that pins them."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    rows = {
        "words": Package("words", "1.0", "", "MIT", "W"),
        "plain": Package("@x/plain", "1.0", "", "MIT", "P", "noto", "", "train", "svg"),
        "old": Package("@x/old", "1.0", "", "CC-BY-4.0", "O", "twemoji", "twemoji", "style", "webp"),
    }
    icons = {
        "width": 16,
        "height": 16,
        "icons": {"apple": {"body": RED}, "red-heart": {"body": RED}, "mans-shoe": {"body": "<g/>"}},
    }
    files: dict[str, dict[str, bytes | object]] = {
        "words": {"en/data.json": EMOJI},
        "plain": {"icons.json": icons, "chars.json": {"1f34e": "apple"}},
        "old": {"assets/1f34e.webp": webp((0, 0, 255, 255)), "assets/1f999.webp": b"never opened"},
    }
    for name, package in rows.items():
        path = tarball(folder / package.file, files[name])
        rows[name] = replace(package, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(artwork, "packages", lambda: (rows["words"], [rows["plain"], rows["old"]]))
    return folder


# ------------------------------------------------------------------------------------------------ fetching


def test_a_full_cache_needs_no_npm(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert fetch(cache) == cache


def test_without_npm_there_is_one_clear_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "x-plain-1.0.tgz").unlink()
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(ArtworkError, match="npm is not installed: .*install Node.js") as caught:
        fetch(cache)
    assert "\n" not in str(caught.value)


def test_a_wrong_checksum_names_file_expected_and_found(cache: Path) -> None:
    path = cache / "x-plain-1.0.tgz"
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes() + b"!")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ArtworkError) as caught:
        fetch(cache)
    assert all(part in str(caught.value) for part in (str(path), expected, found, "delete the file"))


def npm_script(folder: Path, body: str) -> str:
    """A stand-in for npm."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "npm").chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_missing_tarballs_are_packed_by_name_and_version(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept.tgz"
    (cache / "x-plain-1.0.tgz").rename(kept)
    script = f'[ "$1 $2" = "pack @x/plain@1.0" ] && cp {kept} x-plain-1.0.tgz'
    monkeypatch.setenv("PATH", npm_script(tmp_path / "bin", script))
    assert (fetch(cache) / "x-plain-1.0.tgz").read_bytes() == kept.read_bytes()


def test_npms_own_failure_is_passed_on(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "x-plain-1.0.tgz").unlink()
    monkeypatch.setenv("PATH", npm_script(tmp_path / "bin", "echo noise >&2; echo no such version >&2; exit 1"))
    with pytest.raises(ArtworkError, match="npm pack @x/plain@1.0 failed: no such version"):
        fetch(cache)


def test_the_real_table_is_pinned_and_permissive() -> None:
    texts, styles = artwork.packages()
    assert len(styles) == 6 and len({style.word for style in styles}) == 6
    assert [style.style for style in styles if style.split == "style"] == ["twemoji"]
    for package in (texts, *styles):
        assert len(package.sha256) == 64 and package.attribution and package.version.count(".") == 2
        assert package.licence in ("MIT", "Apache-2.0", "CC-BY-4.0")
    assert {len({code for _, _, code in artwork.concept_codes()})} == {len(artwork.concept_codes())} == {72}


# ------------------------------------------------------------------------------------------ words and drawings


def test_base_emoji_only(cache: Path) -> None:
    found = artwork.read_emoji(cache / "words-1.0.tgz")
    assert [one.code for one in found] == ["1f34e", "2764", "1f45e"]
    assert found[0] == Emoji("1f34e", "red apple", ("apple", "fruit"))


def test_icons_join_by_code_point_else_by_label(cache: Path) -> None:
    emoji = artwork.read_emoji(cache / "words-1.0.tgz")
    found = artwork.read_svgs(cache / "x-plain-1.0.tgz", emoji)
    assert list(found) == ["1f34e", "2764", "1f45e"]  # by chars.json; by slug; by slug with an apostrophe
    assert 'viewBox="0 0 16 16"' in found["1f34e"] and RED in found["1f34e"]


def test_aliases_lead_to_their_parent_unless_they_turn_it(tmp_path: Path) -> None:
    icons = {
        "icons": {"a": {"body": RED, "width": 20, "left": -2}},
        "aliases": {"b": {"parent": "a"}, "c": {"parent": "a", "hFlip": True}},
    }
    path = tarball(tmp_path / "p.tgz", {"icons.json": icons})  # as a package without chars.json
    emoji = [Emoji(str(i), label, ()) for i, label in enumerate("abcd")]
    found = artwork.read_svgs(path, emoji)
    assert sorted(found) == ["0", "1"] and 'viewBox="-2 0 20 16"' in found["1"]


def test_a_changed_layout_is_named(tmp_path: Path) -> None:
    path = tarball(tmp_path / "p.tgz", {"other.json": {}})
    with pytest.raises(ArtworkError, match="p.tgz: holds no package/icons.json; the package's layout has changed"):
        artwork.read_svgs(path, [])


def test_drawings_are_trimmed_to_what_is_seen() -> None:
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{RED}</svg>'
    image = Image.open(io.BytesIO(artwork.draw(svg)))
    assert image.mode == "RGBA" and image.size == (artwork.CUTOUT // 2, artwork.CUTOUT)
    pixels = np.asarray(image)
    assert (pixels[2:-2, 2:-2] == (255, 0, 0, 255)).all()
    assert artwork.draw('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"/>') == b""


def test_pictures_and_captions() -> None:
    style = Package("p", "1", "", "MIT", "P", "fluent-flat", "flat", "train", "svg")
    one = Emoji("1f34e", "red apple", ("apple", "fruit", "tree"))
    sample = artwork.sample_of(one, style, Image.new("RGBA", (10, 20), (255, 0, 0, 255)), 64)
    assert sample.key == "fluent-flat-1f34e" and sample.short == "a flat red apple emoji"
    assert sample.detailed == (
        "A picture of a red apple emoji in flat style on a white background. It is about fruit, tree."
    )
    red = np.argwhere((np.asarray(sample.images[0]) == (255, 0, 0)).all(-1))
    assert red.min(0).tolist() == [6, 19] and red.max(0).tolist() == [57, 44]  # 52 high, 26 wide, in the middle


def test_the_default_style_goes_without_saying() -> None:
    plain = Package("p", "1", "", "MIT", "P", "noto", "", "train", "svg")
    sample = artwork.sample_of(Emoji("1", "octopus", ()), plain, Image.new("RGBA", (9, 9)), 16)
    assert sample.short == "an octopus emoji"
    assert sample.detailed == "A picture of an octopus emoji on a white background."


# --------------------------------------------------------------------------------------------------- building


def test_build_writes_both_splits_and_the_cutouts(cache: Path, tmp_path: Path) -> None:
    out = artwork.build(tmp_path / "artwork", cache, size=32, processes=1)
    train, style = ShardReader(out / "train"), ShardReader(out / "style")
    assert [train[i].key for i in range(len(train))] == ["noto-1f34e", "noto-2764"]  # the shoe is a blank drawing
    assert [style[i].short for i in range(len(style))] == ["a twemoji red apple emoji"]
    assert train[0].images[0].size == (32, 32)
    assert [row["licence"] for row in style.licences] == ["MIT", "CC-BY-4.0"]
    cutouts = load_cutouts(out / "cutouts")
    assert set(cutouts.pictures) == {("noto", "apple", ""), ("noto", "heart", "red"), ("twemoji", "apple", "")}
    assert cutouts.words == {"noto": "", "twemoji": "twemoji"}
    apple = next(thing for thing in vocabulary().objects if thing.name == "apple")
    assert cutouts.fitted("twemoji", apple, 24).size == (16, 24)
    assert not list(out.glob(".*"))


def test_a_failed_build_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    (cache / "x-old-1.0.tgz").write_bytes(b"")
    with pytest.raises(ArtworkError, match="x-old-1.0.tgz: expected SHA-256"):
        artwork.build(tmp_path / "artwork", cache, processes=1)
    assert not (tmp_path / "artwork").exists()
