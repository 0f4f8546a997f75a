"""The README is a test: its commands run in order in one folder, and every other promise is at least looked up."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from open_pisces.cli.commands import build_parser, main
from open_pisces.recipe import load_config, trainings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.strip()]

# Not run here, each for the reason beside it; `test_lines_that_are_not_run_still_parse` reads them all the same.
NOT_RUN = {
    "pisces data build artwork": "downloads from npm",
    "pisces data build scenes --out data/scenes/many --count 200000 --pairs 0.5 --many-words": "needs the artwork",
    "pisces data build scenes --out data/scenes/plain --count 15000 --seed 2 --pairs 1 --plain": "likewise",
    (
        "pisces data build scenes --out data/scenes/shapes --count 40000 --seed 3 --pairs 0.6 --shapes 0.8 --many-words"
    ): "likewise",
    "pisces data build scenes --out data/scenes/fresh --count 60000 --seed 1 --pairs 0.5 --many-words": "likewise",
    "pisces train tiny": "takes hours; `pisces train nano` runs the same code",
    "pisces train tiny/stage1 train.lr=1e-3 name=tiny/warmer": "starts from a trained tiny",
    "pisces chat": "waits for words; tests/cli/test_chat.py gives it some",
    "pisces serve": "runs until it is stopped; tests/serve/test_server.py starts it",
    "pisces eval scenes": "needs the downloaded artwork",
    "pisces eval placement": "needs the downloaded artwork",
    "pisces eval diagnose": "needs the downloaded artwork",
}


def arguments_of(line: str) -> list[str]:
    """What a line gives to `pisces`, called by its name or by torchrun."""
    words = shlex.split(line, comments=True)
    return words[words.index("open_pisces") + 1 :] if words[0] == "torchrun" else words[1:]


@pytest.fixture
def packaged_model(nano_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped weights; a source tree without them makes do with nano's."""
    from open_pisces import files
    from open_pisces.model import folder

    if not (folder.WEIGHTS / "config.json").is_file():
        monkeypatch.setattr(folder, "WEIGHTS", nano_folder)
        monkeypatch.setattr(files, "WEIGHTS", nano_folder)


def test_every_line_is_known() -> None:
    assert len(LINES) >= 10
    for line in LINES:
        assert line.startswith(("make ", "pisces ", "torchrun ")) or line == "source .venv/bin/activate", line
    assert set(NOT_RUN) <= set(LINES), "NOT_RUN names lines that the README no longer has"


def test_make_lines_name_targets() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"make demo", "make test"} <= set(LINES)
    for line in LINES:
        if line.startswith("make "):
            assert line.split()[1] in targets, line


def test_the_environment_is_where_the_readme_says() -> None:
    assert "VENV := .venv\n" in (ROOT / "Makefile").read_text()


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("packaged_model")
def test_the_commands_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = 0
    for line in LINES:
        if not line.startswith(("pisces ", "torchrun ")) or line in NOT_RUN:
            continue
        arguments = arguments_of(line)
        if line.startswith("torchrun "):
            started = [sys.executable, "-m", "torch.distributed.run", *shlex.split(line)[1:]]
            code = subprocess.run(started, timeout=170).returncode
        else:
            code = main(arguments)
        assert code == 0, f"{line}: {capfd.readouterr().err}"
        out = capfd.readouterr().out
        assert out, f"{line} said nothing"
        if "--out" in arguments:
            assert os.path.getsize(arguments[arguments.index("--out") + 1]) > 0
        ran += 1
    assert ran >= 6


@pytest.mark.parametrize("line", NOT_RUN)
def test_lines_that_are_not_run_still_parse(line: str) -> None:
    args = build_parser().parse_args(arguments_of(line))
    assert callable(args.run)
    if args.run.__name__ == "train":
        for recipe in trainings(args.recipe) or [args.recipe]:
            load_config(recipe, args.overrides)


DOCS = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_lines_of_the_docs_parse(path: Path) -> None:
    for kind, block in re.findall(r"```(\w+)\n(.*?)```", path.read_text(), re.DOTALL):
        for line in (line for line in block.splitlines() if kind == "sh" and line.strip()):
            args = build_parser().parse_args(arguments_of(line))
            if args.run.__name__ in ("train", "encode"):
                # Models to start from come with the run of these lines (`harness/`).
                load_config(args.recipe, [*args.overrides, "model.settings=recipe"])


@pytest.mark.usefixtures("packaged_model")
def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example, native = [block for kind, block in BLOCKS if kind == "python"]
    exec(compile(example, "README.md", "exec"), {})
    answer = capsys.readouterr().out.strip()
    assert answer.startswith("['") or answer.startswith('["')
    names: dict[str, Any] = {}
    exec(compile(native, "README.md", "exec"), names)
    assert names["heart"].size == (64, 64)


def test_files_and_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert len(links) >= 4
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_every_style_is_thanked_with_its_licence() -> None:
    # Two licences demand attribution; a style added to the artwork must not be forgotten here.
    import yaml

    styles = yaml.safe_load((ROOT / "open_pisces/datasets/scenes/artwork.yaml").read_text())["styles"]
    licences = README[README.index("## Licences") :].replace(" ", "-").replace("-|", "|")
    for style in styles:
        author = style["attribution"].split(", ")[-1].split()[0].removesuffix(",")
        assert author in licences, json.dumps(style)
        assert style["licence"] in licences, json.dumps(style)


def test_every_test_file_that_the_documents_name_exists() -> None:
    named = set(re.findall(r"`((?:\w+/)?test_\w+\.py)`", README + (ROOT / "docs/paper.md").read_text()))
    assert len(named) >= 5
    assert not [name for name in sorted(named) if not (ROOT / "tests" / name).is_file()]
