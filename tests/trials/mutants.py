"""Plants faults in the code, one at a time, and asks the tests: `python tests/trials/mutants.py --count 60 --seed 1`.

A fault is a comparison, an operator, a constant or a condition turned round, a statement left out, or a function that
returns at once, at a place drawn at random from the packages. The tests asked are those that import the module, and
those of modules that import it, the nearest first (all, where none does); a fault that none of them sees is listed as
missed. The code is a copy; the checkout stays as it is.
"""

import argparse
import ast
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("gpt2x", "modeling_gpt2x")
SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.Mult,
}  # fmt: skip
Fault = tuple[ast.expr | ast.stmt, str]


def faults_in(tree: ast.AST) -> Iterator[Fault]:
    """Every place where a fault can be planted, and the text that takes its place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
            yield node, ast.unparse(ast.Compare(node.left, [SWAPS[type(node.ops[0])]()], node.comparators))
        elif isinstance(node, ast.BoolOp):
            yield node, f"({ast.unparse(ast.BoolOp(SWAPS[type(node.op)](), node.values))})"
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS and not _is_text(node):
            yield node, f"({ast.unparse(ast.BinOp(node.left, SWAPS[type(node.op)](), node.right))})"
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, str(not node.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            yield node, str(node.value + 1)
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            yield node.test, f"not ({ast.unparse(node.test)})"
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, "pass"
        elif isinstance(node, ast.FunctionDef) and not any(isinstance(part, ast.Yield) for part in ast.walk(node)):
            first = next((part for part in node.body if not _is_docstring(part)), None)
            if first is not None and not isinstance(first, ast.With | ast.For | ast.If | ast.Try | ast.While):
                yield first, "return None"


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(part, ast.JoinedStr) or _is_docstring(ast.Expr(part)) for part in (node.left, node.right))


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def candidates(file: Path) -> list[Fault]:
    """Those of a file, but not in annotations, where nothing is computed."""
    tree = ast.parse(file.read_text())
    silent = set[int]()
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            silent |= {id(inner) for inner in ast.walk(part)} if part is not None else set()
        if isinstance(node, ast.JoinedStr):  # a place inside of one is not told by all versions of Python
            silent |= {id(inner) for inner in ast.walk(node)}
    return [fault for fault in faults_in(tree) if id(fault[0]) not in silent]


def planted(text: str, fault: Fault) -> str:
    """The file's text with the fault in it."""
    node, replacement = fault
    lines = text.encode().split(b"\n")
    before = lines[node.lineno - 1][: node.col_offset]
    after = lines[(node.end_lineno or 0) - 1][node.end_col_offset :]
    lines[node.lineno - 1 : node.end_lineno] = [before + replacement.encode() + after]
    return b"\n".join(lines).decode()


def imported_by(file: Path) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def tests_near(module: str, *, distance: int) -> list[Path]:
    """Test files by how many imports lie between them and a module, the nearest first."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    imports = {module_of(file): imported_by(file) for file in files}
    tests = {file: imported_by(file) for file in sorted((ROOT / "tests").rglob("test_*.py"))}
    wanted, found = {module}, list[Path]()
    for _ in range(distance):
        found += [file for file, names in tests.items() if names & wanted and file not in found]
        wanted |= {other for other, names in imports.items() if names & wanted}
    room = module.split(".")[1] if module.count(".") > 1 else module.split(".")[-1]
    return found + [file for file in tests if file.parent.name == room and file not in found]


def is_caught(copy: Path, tests: list[Path], *, workers: int) -> str | None:
    """The first test that fails with the fault, or None."""
    names = [str(file.relative_to(ROOT)) for file in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", str(workers), *names]
    environment = os.environ | {"PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        finished = subprocess.run(
            [*command, "--dist", "loadfile"], cwd=copy, env=environment, capture_output=True, text=True, timeout=1200
        )
    except subprocess.TimeoutExpired:
        return "does not end"
    if finished.returncode == 0:
        return None
    failed = [line for line in finished.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else f"pytest ended with {finished.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--distance", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = [ROOT / name for name in tracked if name.endswith(".py") and name.split("/")[0] in PACKAGES]
    places = [(file, fault) for file in files for fault in candidates(file)]
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "gpt2x")
        subprocess.run(["git", "worktree", "add", "--detach", copy], cwd=ROOT, check=True, capture_output=True)
        try:
            for number, (file, fault) in enumerate(random.Random(options.seed).sample(places, options.count)):
                target, start = copy / file.relative_to(ROOT), time.monotonic()
                text = target.read_text()
                target.write_text(planted(text, fault))
                tests = tests_near(module_of(file), distance=options.distance)
                by = is_caught(copy, tests, workers=options.workers)
                target.write_text(text)
                caught += by is not None
                place = f"{file.relative_to(ROOT)}:{fault[0].lineno}"
                was = " ".join(ast.unparse(fault[0]).split())[:60]
                print(
                    f"{number + 1:3} {'caught' if by else 'MISSED'} {place} | {was} -> {fault[1][:60]} | "
                    f"{(by or f'{len(tests)} files of tests')[:100]} | {time.monotonic() - start:.0f} s",
                    flush=True,
                )
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", copy], cwd=ROOT, check=True)
    print(f"{caught} of {options.count} caught")


if __name__ == "__main__":
    main()
