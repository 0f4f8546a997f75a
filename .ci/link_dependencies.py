"""Give a new environment what this one holds of a package's dependencies, and nothing else: a second, without pip.

``python link_dependencies.py PACKAGE SITE_PACKAGES``: links to the installed files of everything that PACKAGE requires
without extras, directly or not. Whatever it imports but does not require is missing there, as on a user's machine.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def required(name: str, found: dict[str, Distribution], extras: frozenset[str] = frozenset()) -> None:
    """Add what ``name`` requires to ``found``, and what that requires."""
    for text in distribution(name).requires or []:
        wanted = Requirement(text)
        if wanted.marker and not any(wanted.marker.evaluate({"extra": extra}) for extra in extras or {""}):
            continue
        key = canonicalize_name(wanted.name)
        if key not in found or wanted.extras:
            found[key] = distribution(wanted.name)
            required(wanted.name, found, frozenset(wanted.extras))


def main(package: str, target: Path) -> None:
    """Link every top-level file and folder of the dependencies into ``target``."""
    found: dict[str, Distribution] = {}
    required(package, found)
    for one in found.values():
        for top in {file.parts[0] for file in one.files or []} - {"..", "__pycache__"}:
            link = target / top
            if not link.exists():  # folders such as google/ belong to several
                link.symlink_to(Path(str(one.locate_file(top))))
    print(f"linked {len(found)} dependencies of {package}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
