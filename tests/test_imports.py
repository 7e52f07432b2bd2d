"""The import contracts: scripts, benchmarks -> gpt2x -> modeling_gpt2x -> torch, transformers, and no way back."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOPS = ("scripts", "benchmarks", "gpt2x", "modeling_gpt2x")

# The rooms of gpt2x from the lowest up: each may import those of the lines before its own.
LAYERS = """
    addresses commands
    errors
    terminal files runs.layout
    manifest
    locate
    prerequisites scan reporting
    config
    command_line
    distributed
    corpus
    tokenizers
    shards
    preparation
    streams
    checkpoints
    runs
    stock_forms
    batches
    models
    adapters
    evaluation
    chat
    publishing
    training
    preflight
    run
"""
LAYER = {room: number for number, line in enumerate(LAYERS.split("\n")) for room in line.split()}
# What may not be reached from a room, not even through others.
NOT_REACHED = {
    "torch": [room for room in LAYER if LAYER[room] <= LAYER["command_line"]],
    "modeling_gpt2x": [
        "corpus",
        "tokenizers",
        "shards",
        "preparation",
        "streams",
        "distributed",
        "checkpoints",
        "runs",
    ],
}
LARGEST_SHARE = 0.13


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for top in TOPS for file in sorted((ROOT / top).rglob("*.py"))}


def imports_of(module: str) -> Iterator[str]:
    """What a module imports, anywhere in it, by absolute name; `from a import b` is `a`, and `a.b` if a module."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names if f"{source}.{alias.name}" in FILES)


IMPORTS = {module: {*imports_of(module)} - {module} for module in FILES}
# The only exception: from_pretrained of a stock model asks gpt2x, late and in a `try`, to convert it.
IMPORTS["modeling_gpt2x.modeling_gpt2x"].remove("gpt2x.stock_forms")


def top(module: str) -> str:
    return module.split(".")[0]


def room(module: str) -> str:
    """The second part of a name: gpt2x.ROOM.x; the package gpt2x itself has none. A module may have its own layer."""
    parts = [*module.split("."), ""]
    own = ".".join(parts[1:3])
    return own if own in LAYER else parts[1]


def modules_of(*tops: str) -> list[str]:
    return [module for module in FILES if top(module) in tops]


def reached_from(module: str) -> set[str]:
    """What a module imports, and what that imports, and so on."""
    reached, ahead = set[str](), [module]
    while ahead:
        new = IMPORTS.get(ahead.pop(), set()) - reached
        reached |= new
        ahead += new
    return reached


def test_every_room_has_its_layer():
    assert {room(module) for module in modules_of("gpt2x")} - {""} == {*LAYER}


def test_no_import_runs_upward():
    upward = {
        f"{module} -> {name}"
        for module in FILES
        for name in IMPORTS[module]
        if (top(name) in TOPS and TOPS.index(top(name)) < TOPS.index(top(module)))
        or (top(module) == top(name) == "gpt2x" and room(module) != room(name) and not is_below(module, name))
    }
    assert upward == set()


def is_below(module: str, name: str) -> bool:
    return room(name) == "" or (room(module) != "" and LAYER[room(name)] < LAYER[room(module)])


def test_no_module_imports_itself_in_a_circle():
    assert [module for module in FILES if module in reached_from(module)] == []


def test_scripts_and_tests_are_imported_by_nobody():
    """A script's own folder is the first on sys.path, so another script would be imported by its bare name."""
    scripts = {room(module) for module in modules_of("scripts")}
    assert [
        f"{module} -> {name}" for module in FILES for name in IMPORTS[module] if top(name) in scripts | {"tests"}
    ] == []


def test_what_is_not_needed_is_not_reached():
    reached = {
        f"{module} reaches {package}"
        for package, rooms in NOT_REACHED.items()
        for module in modules_of("gpt2x")
        if room(module) in rooms and package in {top(name) for name in reached_from(module)}
    }
    assert reached == set()


def test_data_is_prepared_without_torch():
    """transformers' tokenizers need none; its models, and torch, take seconds to import."""
    rooms = {"corpus", "tokenizers", "shards", "preparation"}
    direct = {
        module: {top(name) for name in IMPORTS[module]} for module in modules_of("gpt2x") if room(module) in rooms
    }
    # which imports it where a file of torch.save is read
    assert {module for module, tops in direct.items() if "torch" in tops} == {"gpt2x.shards.foreign.formats"}


def test_the_command_line_loads_neither_torch_nor_transformers():
    code = "import sys, gpt2x.command_line, gpt2x.locate; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


def test_what_travels_to_the_hub_needs_torch_and_transformers_only():
    known = {"torch", "transformers", "huggingface_hub", "safetensors", "modeling_gpt2x", *sys.stdlib_module_names}
    assert {top(name) for module in modules_of("modeling_gpt2x") for name in IMPORTS[module]} <= known


def test_what_travels_to_the_hub_imports_its_siblings_by_name_at_the_top():
    """transformers finds the files to copy by a regular expression over `from .sibling import name`.

    Any other spelling ships nothing, in a docstring it crashes save_pretrained, and inside a function or an `if` it
    drags the sibling along all the same.
    """
    for module in modules_of("modeling_gpt2x"):
        text = FILES[module].read_text()
        tree = ast.parse(text)
        top_level = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
        assert [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level] == top_level
        assert len(re.findall(r"from\s+\.|import\s+\.", text)) == len(top_level)
        assert all(node.level == 1 and f"modeling_gpt2x.{node.module}" in FILES for node in top_level)
        absolute = [node.names[0].name for node in ast.walk(tree) if isinstance(node, ast.Import)]
        absolute += [
            str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level
        ]
        assert "modeling_gpt2x" not in {top(name) for name in absolute}


def test_a_module_is_named_by_what_it_does():
    assert {name.rpartition(".")[2] for name in FILES} & {
        "common",
        "helpers",
        "helper",
        "misc",
        "util",
        "utils",
    } == set()


def test_a_script_hides_no_other_module():
    """A script's folder is first on sys.path: scripts/evaluate.py would be what `import evaluate` finds."""
    others = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()}
    others |= {"evaluate", "tokenizers", "trackio", "wandb"}
    assert {room(script) for script in modules_of("scripts")} & others == set()


def test_what_travels_to_the_hub_is_flat_and_small():
    files = [FILES[module] for module in modules_of("modeling_gpt2x")]
    assert {file.parent for file in files} == {ROOT / "modeling_gpt2x"}
    assert len(files) <= 6
    assert sum(len(file.read_text().splitlines()) for file in files) <= 1350


def test_no_package_of_gpt2x_is_too_large_a_part_of_the_whole():
    lines = {module: len(file.read_text().splitlines()) for module, file in FILES.items()}
    packages = {room(module): 0 for module in modules_of("gpt2x") if module.count(".") > 1}
    for module in modules_of("gpt2x"):
        if room(module) in packages:
            packages[room(module)] += lines[module]
    assert {name for name, count in packages.items() if count > LARGEST_SHARE * sum(lines.values())} == set()


def test_no_folder_holds_more_than_sixteen_modules():
    folders = [file.parent for file in FILES.values() if file.name != "__init__.py"]
    assert {str(folder): folders.count(folder) for folder in folders if folders.count(folder) > 16} == {}
