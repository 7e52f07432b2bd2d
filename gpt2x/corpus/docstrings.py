"""Conversations from this interpreter's standard library: what its classes and functions say of themselves.

Sources are parsed, never imported.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

MAX_FOLLOW_UPS = 3

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def conversations(file: Path, module: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A conversation per documented function and class of a source file; about a class also about some methods.

    Args:
        file: the source; one that is not UTF-8 or not of this Python's grammar has none.
        module: its dotted name.

    Yields:
        The dotted name of what it is about, and its messages, of user and assistant in turn.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in _public(tree):
        answer, name = _summary(node), f"{module}.{node.name}"
        if answer is None:
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        messages = _turn(f"What does the {kind} {name} do?", answer)
        for method in _public(node)[:MAX_FOLLOW_UPS] if isinstance(node, ast.ClassDef) else []:
            if (answer := _summary(method)) is not None:
                messages += _turn(f"And its method {method.name}?", answer)
        yield name, messages


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _public(parent: ast.Module | ast.ClassDef) -> list[Definition]:
    definitions = (node for node in parent.body if isinstance(node, Definition))
    return [node for node in definitions if not node.name.startswith("_")]


def _summary(node: Definition) -> str | None:
    """The docstring's first paragraph on one line."""
    docstring = ast.get_docstring(node) or ""
    return re.sub(r"\s+", " ", docstring.split("\n\n")[0]).strip() or None
