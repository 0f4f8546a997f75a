"""The formats that ``pisces data import`` reads; it imports nothing, so that ``--help`` can list them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A name for `import_dataset`: the module of ``readers/`` that reads it, and the options it takes."""

    module: str
    options: tuple[str, ...]
    about: str


_TEXTS = ("caption_field", "detailed_field")
_PICTURES = ("image_field", "images")
_COLUMNS = (*_TEXTS, *_PICTURES)
FORMATS = {
    "folder": Format("folder", _COLUMNS, "pictures with a CSV, TSV, JSONL or COCO file, or NAME.txt beside NAME.jpg"),
    "webdataset": Format("webdataset", (*_TEXTS, "image_field"), "tar files of img2dataset or WebDataset"),
    "coco": Format("coco", ("images", "split"), "COCO captions (`images` + `annotations`), or Karpathy's splits of it"),
    "huggingface": Format("huggingface", (*_COLUMNS, "split"), "a hub name or local folder, through `datasets`"),
    "llava": Format("llava", _PICTURES, "conversations as a JSON array or JSONL, pictures in a folder"),
    "parquet": Format("parquet", _COLUMNS, "tables of captions or conversations, with pictures or their names"),
    "pixelprose": Format("parquet", _COLUMNS, "PixelProse parquet; pictures named by uid or key in the images folder"),
    "cambrian": Format("parquet", _PICTURES, "Cambrian parquet or JSONL, pictures in a folder"),
    "onevision": Format("parquet", _PICTURES, "LLaVA-OneVision parquet"),
}
