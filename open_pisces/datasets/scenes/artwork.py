"""Emoji artwork from npm packages: fetched, checked, rendered, joined with CLDR names.

Builds three things in one folder: ``train`` and ``style`` (shards; ``style`` holds the one style that is never
trained on) and ``cutouts`` (the transparent drawings that `open_pisces.datasets.scenes.composer` composes).
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image as Pillow
from PIL.Image import Image

from open_pisces.batch import Sample
from open_pisces.data.shards import data_path
from open_pisces.datasets.shard_writer import ShardWriter
from open_pisces.errors import PiscesError
from open_pisces.files import sha256_of, whole_folder

HERE = Path(__file__).parent
CUTOUT = 96
"""Longer side of a stored cut-out, in pixels."""
DRAWING = 52 / 64
"""Longer side of the drawing in an artwork picture, as a share of the picture."""
_COMPONENTS = 2  # emojibase's group of skin tones and hair
_FLAGS = 9
_RENDER = 160  # pixels a drawing is rendered at before it is trimmed and reduced


class ArtworkError(PiscesError):
    """Artwork that cannot be fetched or used; the message names the package or file and the remedy."""


@dataclass(frozen=True)
class Package:
    """One pinned npm package (a row of ``artwork.yaml``)."""

    name: str
    version: str
    sha256: str
    licence: str
    attribution: str
    style: str = ""
    word: str = ""
    split: str = ""
    kind: str = "json"

    @property
    def file(self) -> str:
        """The tarball's name, as `npm pack` chooses it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def licence_row(self) -> dict[str, str]:
        """A row of a dataset's licence table."""
        return {
            "package": self.name, "version": self.version, "licence": self.licence, "attribution": self.attribution
        }  # fmt: skip


@dataclass(frozen=True)
class Emoji:
    """The words of one emoji: CLDR label and keywords, from emojibase."""

    code: str
    label: str
    tags: tuple[str, ...]


def packages() -> tuple[Package, list[Package]]:
    """The pinned packages: the one with the texts, and one for each style."""
    table = yaml.safe_load((HERE / "artwork.yaml").read_text())
    return Package(**table["texts"]), [Package(**row) for row in table["styles"]]


# ------------------------------------------------------------------------------------------------- fetching


def fetch(cache: str | Path | None = None) -> Path:
    """Download what is missing in ``cache`` (default: ``downloads`` in the data folder) and check every tarball.

    Raises:
        ArtworkError: without npm, when npm fails, or for a tarball with another checksum.
    """
    folder = Path(cache) if cache is not None else data_path("downloads")
    texts, styles = packages()
    for package in (texts, *styles):
        if not (folder / package.file).is_file():
            _npm_pack(package, folder)
        check(folder / package.file, package.sha256)
    return folder


def _npm_pack(package: Package, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ArtworkError(
            "npm is not installed: artwork comes from npm packages; install Node.js (https://nodejs.org)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    wanted = f"{package.name}@{package.version}"
    done = subprocess.run([npm, "pack", wanted, "--loglevel=error"], cwd=folder, capture_output=True, text=True)
    if done.returncode or not (folder / package.file).is_file():
        reason = (done.stderr.strip() or "no tarball appeared").splitlines()[-1]
        raise ArtworkError(f"npm pack {wanted} failed: {reason}; check the network and the registry npm uses")


def check(path: Path, sha256: str) -> None:
    """Compare a tarball with its pinned checksum.

    Raises:
        ArtworkError: naming file, expected and found checksum.
    """
    found = sha256_of(path)
    if found != sha256:
        raise ArtworkError(f"{path}: expected SHA-256 {sha256}, found {found}; delete the file and fetch it again")


# ------------------------------------------------------------------------------------- words and drawings


def read_emoji(tarball: Path) -> list[Emoji]:
    """All base emoji of emojibase: no skin tones, components or flags."""
    rows = json.loads(_member(tarball, "package/en/data.json"))
    kept = (row for row in rows if row.get("group") not in (None, _COMPONENTS, _FLAGS))
    return [Emoji(plain_code(row["hexcode"]), row["label"], tuple(row.get("tags", ()))) for row in kept]


def plain_code(code: str) -> str:
    """A code point sequence as all sets spell it here: lower case, without the variation selector FE0F."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def read_svgs(tarball: Path, emoji: list[Emoji]) -> dict[str, str]:
    """The SVG of each emoji in an Iconify package, by code.

    Names come from ``chars.json``; packages that leave it empty are matched by the label's slug.
    """
    icons = json.loads(_member(tarball, "package/icons.json"))
    names = {plain_code(code): name for code, name in json.loads(_member(tarball, "package/chars.json", "{}")).items()}
    found = ((one.code, _svg(icons, names.get(one.code) or _slug(one.label))) for one in emoji)
    return {code: svg for code, svg in found if svg is not None}


def _svg(icons: dict[str, Any], name: str) -> str | None:
    alias = icons.get("aliases", {}).get(name)
    if alias is not None and set(alias) == {"parent"}:  # an alias that turns or flips its parent is another drawing
        name = alias["parent"]
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    box = [icon.get(key, icons.get(key, standard)) for key, standard in _BOX]
    view = " ".join(map(str, box))
    return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view}">' + (
        f"{icon['body']}</svg>"
    )


_BOX = (("left", 0), ("top", 0), ("width", 16), ("height", 16))  # Iconify's defaults


def _slug(label: str) -> str:
    """How Iconify names an icon after its label: "man’s shoe" -> "mans-shoe"."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("’", "")).strip("-")


def read_webps(tarball: Path, emoji: list[Emoji]) -> dict[str, bytes]:
    """The WebP file of each emoji in a package of pictures, by code."""
    wanted = {one.code for one in emoji}
    pictures = {}
    with tarfile.open(tarball) as tar:
        for member in tar:
            code = plain_code(Path(member.name).stem)
            if member.name.endswith(".webp") and code in wanted:
                pictures[code] = _bytes(tar, member)
    return pictures


def _member(tarball: Path, name: str, missing: str | None = None) -> bytes:
    with tarfile.open(tarball) as tar:
        try:
            return _bytes(tar, tar.getmember(name))
        except KeyError:
            if missing is not None:
                return missing.encode()
            raise ArtworkError(f"{tarball}: holds no {name}; the package's layout has changed") from None


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ArtworkError(f"{tar.name!r}: {member.name} is no plain file; the package's layout has changed")
    return file.read()


# ----------------------------------------------------------------------------------------------- rendering


def draw(drawing: str | bytes) -> bytes:
    """Render an SVG (text) or decode a picture (bytes) to a trimmed RGBA PNG, longer side `CUTOUT`; empty if blank."""
    if isinstance(drawing, str):
        try:
            import resvg_py
        except ImportError:
            raise ArtworkError(
                "resvg-py is not installed, and draws the SVGs: pip install 'open-pisces[data]'"
            ) from None
        drawing = bytes(resvg_py.svg_to_bytes(svg_string=drawing, width=_RENDER, skip_system_fonts=True))
    image = Pillow.open(io.BytesIO(drawing)).convert("RGBA")
    visible = image.getchannel("A").point([0] * 12 + [255] * 244).getbbox()  # a soft shadow's rim is no content
    if visible is None:
        return b""
    buffer = io.BytesIO()
    fit(image.crop(visible), CUTOUT).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def fit(cutout: Image, side: int) -> Image:
    """A cut-out whose longer side is ``side`` pixels."""
    scale = side / max(cutout.size)
    width, height = (max(1, round(length * scale)) for length in cutout.size)
    return cutout.resize((width, height), Pillow.Resampling.LANCZOS)


def on_white(cutout: Image, size: int) -> Image:
    """An artwork picture: the drawing in the middle of a white square of ``size`` pixels."""
    square = Pillow.new("RGB", (size, size), (255, 255, 255))
    small = fit(cutout, round(size * DRAWING))
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2), small)
    return square


# ---------------------------------------------------------------------------------------------- the datasets


def build(out: str | Path | None = None, cache: str | Path | None = None, size: int = 64, processes: int = 2) -> Path:
    """Fetch, render and write ``train``, ``style`` and ``cutouts`` under ``out`` (default: ``artwork`` in the data).

    Args:
        out: the folder to write.
        cache: where downloads are kept.
        size: side of the pictures in pixels.
        processes: processes that render.

    Raises:
        ArtworkError: if the packages cannot be fetched or fail their checks.
    """
    folder = Path(out) if out is not None else data_path("artwork")
    downloads = fetch(cache)
    texts, styles = packages()
    emoji = read_emoji(downloads / texts.file)
    drawn = {style.style: _draw_all(downloads / style.file, style, emoji, processes) for style in styles}
    for split in ("train", "style"):
        members = [style for style in styles if style.split == split]
        with ShardWriter(folder / split, licences=[p.licence_row for p in (texts, *members)]) as writer:
            for sample in _samples(members, emoji, drawn, size):
                writer.write(sample)
    _write_cutouts(folder / "cutouts", styles, drawn)
    return folder


def _draw_all(tarball: Path, style: Package, emoji: list[Emoji], processes: int) -> dict[str, bytes]:
    """Trimmed RGBA PNGs of one style, by code."""
    found: dict[str, Any] = (read_svgs if style.kind == "svg" else read_webps)(tarball, emoji)
    with ProcessPoolExecutor(processes) as pool:
        drawn = dict(zip(found, pool.map(draw, found.values(), chunksize=32), strict=True))
    return {code: png for code, png in drawn.items() if png}


def _samples(
    styles: list[Package], emoji: list[Emoji], drawn: dict[str, dict[str, bytes]], size: int
) -> Iterator[Sample]:
    for one in emoji:
        for style in styles:
            png = drawn[style.style].get(one.code)
            if png is not None:
                yield sample_of(one, style, Pillow.open(io.BytesIO(png)), size)


def sample_of(emoji: Emoji, style: Package, cutout: Image, size: int) -> Sample:
    """An artwork picture with its captions.

    The short caption says "emoji", so that it never promises the same words as a scene drawn at another size.
    """
    label = emoji.label.replace("’", "'").replace(":", "").lower()
    keywords = [tag for tag in emoji.tags if tag.lower() not in label.split()]
    named = f"{style.word} {label}".strip()
    in_style = f" in {style.word} style" if style.word else ""
    known = f" It is about {', '.join(keywords)}." if keywords else ""
    return Sample(
        key=f"{style.style}-{emoji.code}",
        images=(on_white(cutout, size),),
        short=f"{article(named)} emoji",
        detailed=f"A picture of {article(label)} emoji{in_style} on a white background.{known}",
        source=f"artwork/{style.style}",
        facts={"code": emoji.code, "style": style.style, "label": label},
    )


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"{'an' if words[:1] in 'aeiou' else 'a'} {words}"


def _write_cutouts(folder: Path, styles: list[Package], drawn: dict[str, dict[str, bytes]]) -> None:
    """Put the drawings that scenes need into a folder of PNGs with a table of what they are."""
    words = {style.style: style.word for style in styles}
    licences = {style.style: style.licence_row for style in styles}
    rows: list[dict[str, str]] = []
    with whole_folder(folder) as work:
        for style in styles:
            pictures = drawn[style.style]
            for concept, color, code in concept_codes():
                if code in pictures:
                    file = f"{style.style}-{code}.png"
                    (work / file).write_bytes(pictures[code])
                    rows.append({"concept": concept, "colour": color, "style": style.style, "file": file})
        table = {"version": 1, "words": words, "cutouts": rows, "licences": licences}
        (work / "cutouts.json").write_text(json.dumps(table, indent=1))


def concept_codes() -> list[tuple[str, str, str]]:
    """(concept, a shape's color or "", code) of everything scenes are made of, from ``concepts.yaml``."""
    table = yaml.safe_load((HERE / "concepts.yaml").read_text())
    found = [(name, "", plain_code(str(row["code"]))) for name, row in table["objects"].items()]
    for name, row in table["shapes"].items():
        found += [(name, color, plain_code(str(code))) for color, code in row.items()]
    return found
