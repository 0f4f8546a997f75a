"""What a stranger reads first: the notebook, the figure, and the files at the root."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples/tour.ipynb"
FIGURE = ROOT / "docs/architecture.png"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
LINK = re.compile(r"\]\(([^)#]+)\)")
ABSOLUTE = re.compile(r"""(?:^|[\s"'(=:])(/(?:home|root|tmp|usr|opt|mnt|var|work|Users|private)/[^\s"']*)|[A-Z]:\\\\""")


def strings(value: Any) -> list[str]:
    """All texts in a JSON value but base64 pictures, lines of one text joined."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, one in value.items() if not key.startswith("image/") for text in strings(one)]
    if isinstance(value, list):
        return ["".join(value)] if all(isinstance(one, str) for one in value) else sum(map(strings, value), [])
    return []


def top_level(path: Path) -> set[str]:
    """The names that a file binds at its top level, imports included."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}
    return names


# ----------------------------------------------------------------------------------------------------- the notebook


def test_the_notebook_is_small_and_every_code_cell_was_run_in_order_without_errors() -> None:
    assert NOTEBOOK.stat().st_size < 400_000
    cells = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert len(cells) >= 8
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell["outputs"], f"no output: {''.join(cell['source'])}"
        assert not [one for one in cell["outputs"] if one["output_type"] == "error" or one.get("name") == "stderr"]


def test_the_notebook_names_no_place_of_a_machine() -> None:
    assert ABSOLUTE.search("in /home/me/a.png") and ABSOLUTE.search('"/tmp/x"') and not ABSOLUTE.search("a/tmp/x")
    assert not [text for text in strings(CELLS) if ABSOLUTE.search(text)]


@pytest.mark.parametrize("number", range(len(CODE)))
def test_a_cell_compiles_and_imports_what_is_there(number: int) -> None:
    tree = ast.parse(CODE[number])
    compile(tree, f"cell {number}", "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("open_pisces."):
            place = ROOT / (node.module or "").replace(".", "/")
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            assert file.is_file(), f"{node.module} is not there: change the cell and run the notebook again"
            assert not {alias.name for alias in node.names} - top_level(file), ast.unparse(node)


# ------------------------------------------------------------------------------------------------------- the figure


def test_the_figure_is_a_small_png() -> None:
    assert FIGURE.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert FIGURE.stat().st_size <= 200_000


def test_the_figure_names_classes_of_the_package_and_the_files_that_define_them() -> None:
    tree = ast.parse((ROOT / "scripts/draw_architecture.py").read_text())
    (table,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "CLASSES"]
    named = ast.literal_eval(table)
    defined = {name: top_level(ROOT / "open_pisces" / file) for name, file in named.items()}
    moved = [name for name in named if name not in defined[name]]
    assert not moved, f"change CLASSES and draw the figure again: {moved}"
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "box"]
    drawn = {ast.literal_eval(call.args[1]) for call in calls}
    assert len(drawn) >= 7 and drawn | {"Pisces"} == set(named)


# -------------------------------------------------------------------------------------------------- files at the root


def test_the_citation_names_the_software_and_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert cited["title"] and cited["message"] and cited["authors"] == [{"name": "The open_pisces authors"}]
    paper = cited["preferred-citation"]
    assert "2506.10395" in paper["journal"] and paper["url"] == "https://arxiv.org/abs/2506.10395"
    # The same authors in the same order as the README's BibTeX.
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    (bibtex,) = re.findall(r"author\s*= \{(.*?)\}", (ROOT / "README.md").read_text(), re.DOTALL)
    assert names == re.split(r"\s+and\s+", bibtex.strip())


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert (ROOT / ".ci/run").is_file()


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    links = [link for link in LINK.findall((ROOT / name).read_text()) if not link.startswith("http")]
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_the_notebooks_links_lead_somewhere() -> None:
    links = [link for text in strings(CELLS) for link in LINK.findall(text) if "/" in link and " " not in link]
    assert len(links) >= 5 and not [link for link in links if not (NOTEBOOK.parent / link).exists()]


def test_the_guide_names_files_and_targets_that_are_there() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:open_pisces|tests|scripts|docs)/[^`\s]*)`", guide)
    assert len(paths) >= 15 and not [path for path in paths if not (ROOT / path).exists()]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert not set(re.findall(r"^make ([a-z]+)", guide, re.MULTILINE)) - targets
