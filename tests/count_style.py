"""Counts what makes lines hard to read: ``python tests/count_style.py [FOLDER]`` prints a table per room.

packed       ``a, b = x, y``: several assignments in one line
nested       a comprehension with two ``for``, with another comprehension inside, or with a conditional expression in it
fragments    private functions that are used once in their file and have less than 6 lines
comments     lines with a comment, for each hundred lines
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "open_pisces"
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def packed(tree: ast.AST) -> list[int]:
    """Lines of assignments of a tuple to a tuple."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)
    ]


def nested(tree: ast.AST) -> list[int]:
    """Lines of comprehensions that hold two ``for``, another comprehension, or a conditional expression."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            inside = [child for child in ast.walk(node) if child is not node]
            if len(node.generators) > 1 or any(isinstance(child, (*COMPREHENSIONS, ast.IfExp)) for child in inside):
                found.append(node.lineno)
    return found


def fragments(tree: ast.AST, text: str) -> list[int]:
    """Lines of private functions that are used once and have less than 6 lines."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and re.match(r"_[a-z]", node.name) and not node.decorator_list:
            uses = len(re.findall(rf"\b{node.name}\b", text)) - 1
            if uses == 1 and node.end_lineno is not None and node.end_lineno - node.lineno < 5:
                found.append(node.lineno)
    return found


def comments(text: str) -> int:
    """Comments in a file, those of tools left out."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(t.type == tokenize.COMMENT and not re.match(r"# (noqa|type:|fmt:|-{5})", t.string) for t in tokens)


def count(folder: Path) -> dict[str, Counter[str]]:
    """The figures of each room below a folder."""
    rooms: dict[str, Counter[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text()
        tree = ast.parse(text)
        room = rooms.setdefault(str(path.parent.relative_to(folder)), Counter())
        room["files"] += 1
        room["lines"] += len(text.splitlines())
        room["packed"] += len(packed(tree))
        room["nested"] += len(nested(tree))
        room["fragments"] += len(fragments(tree, text))
        room["comments"] += comments(text)
    return rooms


def main(folder: Path, names: bool) -> None:
    """Print the table, and with ``names`` each place."""
    columns = ("files", "lines", "packed", "nested", "fragments", "comments")
    rooms = count(folder)
    total: Counter[str] = sum(rooms.values(), Counter())
    print(f"{'room':22}" + "".join(f"{column:>10}" for column in columns))
    for room, row in [*rooms.items(), ("all", total)]:
        print(f"{room:22}" + "".join(f"{row[column]:>10}" for column in columns))
    for path in sorted(folder.rglob("*.py")) if names else ():
        text = path.read_text()
        tree = ast.parse(text)
        for what, lines in (("packed", packed(tree)), ("nested", nested(tree)), ("fragment", fragments(tree, text))):
            for line in lines:
                print(f"{path}:{line}: {what}")


if __name__ == "__main__":
    places = [argument for argument in sys.argv[1:] if argument != "--names"]
    main(Path(places[0]) if places else PACKAGE, "--names" in sys.argv)
