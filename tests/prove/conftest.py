"""Where proofs leave their figures: ``docs/proof.json``, one entry each, with the commit."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROOF = ROOT / "docs" / "proof.json"


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keeps a proof's figures under its name; only a proof that came this far has any."""

    def write(**figures: Any) -> None:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout
        proofs = json.loads(PROOF.read_text()) if PROOF.is_file() else {}
        name = request.node.originalname  # cases of one proof add up
        proofs[name] = {**proofs.get(name, {}), **figures, "commit": commit.strip()}
        PROOF.write_text(json.dumps(dict(sorted(proofs.items())), indent=1) + "\n")

    return write
