"""open_pisces: an open implementation of Pisces (arXiv 2506.10395).

The names below load on first use, so that ``import open_pisces`` and ``pisces --help`` stay free of PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_pisces.generate.generator import Generator
    from open_pisces.model.pisces import Pisces
    from open_pisces.recipe import load_config

    __version__: str

__all__ = ["Generator", "Pisces", "__version__", "load_config"]

_HOMES = {
    "Pisces": "open_pisces.model.pisces",
    "Generator": "open_pisces.generate.generator",
    "load_config": "open_pisces.recipe",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'open_pisces' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    """The installed distribution's version; a source tree that was never installed has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("open-pisces")
    except PackageNotFoundError:
        return "0+source"
