"""The import direction: scripts, benchmarks -> gpt2x -> modeling_gpt2x -> torch, transformers, and no way back."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("scripts", "benchmarks", "gpt2x", "modeling_gpt2x")

# Each may import those before it. reporting stands beside them: it reads files and knows errors and files only.
ORDER = [
    "addresses",
    "errors",
    "terminal",
    "files",
    "manifest",
    "locate",
    "config",
    "command_line",
    "shards",
    "streams",
    "accelerators",
    "batches",
    "vocabulary",
    "models",
    "adapters",
    "evaluation",
    "publishing",
    "training",
    "preflight",
    "run",
]
WITHOUT_TORCH = ("addresses", "errors", "terminal", "files", "manifest", "locate", "config", "reporting")
ALLOWED_TOPS = {
    "scripts": {"gpt2x", "modeling_gpt2x", "benchmarks"},
    "benchmarks": {"gpt2x", "modeling_gpt2x", "benchmarks"},
    "gpt2x": {"gpt2x", "modeling_gpt2x"},
    "modeling_gpt2x": {"modeling_gpt2x"},
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for top in TOPS for file in sorted((ROOT / top).rglob("*.py"))}
GPT2X = [name for name in FILES if name.split(".")[0] == "gpt2x"]
MODELING = [name for name in FILES if name.split(".")[0] == "modeling_gpt2x"]
SCRIPTS = [name for name in FILES if name.split(".")[0] == "scripts"]


def imports(module: str) -> Iterator[str]:
    """Absolute names of what a module imports, anywhere in it; `from a import b` gives `a`, and `a.b` if a module."""
    file = FILES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names if f"{source}.{alias.name}" in FILES)


def section(module: str) -> str:
    """The second part of a name, gpt2x.SECTION.x; the package gpt2x itself has none."""
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_what_stands_below_it(module):
    reached = {name.split(".")[0] for name in imports(module)} & {*TOPS, "tests"}
    # A script's own folder is the first on sys.path, so another script would be imported by its bare name.
    scripts_by_bare_name = {name.split(".")[0] for name in imports(module)} & {section(name) for name in SCRIPTS}
    assert reached <= ALLOWED_TOPS[module.split(".")[0]]
    assert scripts_by_bare_name == set()


@pytest.mark.parametrize("module", GPT2X)
def test_a_section_of_gpt2x_imports_only_sections_before_it(module):
    own = section(module)
    reached = {section(name) for name in imports(module) if name.split(".")[0] == "gpt2x"} - {own, "", "errors"}
    if own in ("", "reporting"):
        before = {"files"}
    else:
        assert own in ORDER, f"{module} has no place yet; give it one in ORDER."
        reads_reports = own in ("publishing", "training", "preflight", "run")
        before = {*ORDER[: ORDER.index(own)], *({"reporting"} if reads_reports else ())}
    assert reached <= before


@pytest.mark.parametrize("module", [name for name in GPT2X if section(name) in ("shards", "batches", "training")])
def test_what_trains_any_causal_lm_imports_no_model_class(module):
    assert "modeling_gpt2x" not in {name.split(".")[0] for name in imports(module)}


@pytest.mark.parametrize("module", [name for name in GPT2X if section(name) in WITHOUT_TORCH])
def test_what_only_reads_files_imports_no_torch(module):
    assert {name.split(".")[0] for name in imports(module)} & {"torch", "transformers", "modeling_gpt2x"} == set()


@pytest.mark.parametrize("module", ["gpt2x.config", "gpt2x.errors", "gpt2x.locate"])
def test_the_configuration_loads_neither_torch_nor_transformers(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


@pytest.mark.parametrize("module", MODELING)
def test_what_travels_to_the_hub_needs_torch_and_transformers_only(module):
    foreign = {name.split(".")[0] for name in imports(module)} - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "transformers", "huggingface_hub", "safetensors", "modeling_gpt2x"}


@pytest.mark.parametrize("module", MODELING)
def test_what_travels_to_the_hub_imports_its_siblings_by_name_at_the_top(module):
    """transformers finds the files to copy by a regular expression over `from .sibling import name`.

    Any other spelling ships nothing, in a docstring it crashes save_pretrained, and inside a function or an `if` it
    drags the sibling along all the same.
    """
    text = FILES[module].read_text()
    tree = ast.parse(text)
    top_level = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    anywhere = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert anywhere == top_level
    assert len(re.findall(r"from\s+\.|import\s+\.", text)) == len(top_level)
    for node in top_level:
        assert node.level == 1
        assert f"modeling_gpt2x.{node.module}" in FILES
    absolute = [node.names[0].name for node in ast.walk(tree) if isinstance(node, ast.Import)]
    absolute += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    assert not [name for name in absolute if name.split(".")[0] == "modeling_gpt2x"]


def test_what_travels_to_the_hub_is_flat():
    assert [name for name in MODELING if name.count(".") > 1] == []


def test_no_module_imports_itself_in_a_circle():
    graph = {module: {name for name in imports(module) if name in FILES and name != module} for module in FILES}
    tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", FILES)
def test_a_module_is_named_by_what_it_does(module):
    assert module.rpartition(".")[2] not in {"common", "helpers", "helper", "misc", "util", "utils"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_hides_no_other_module(script):
    """A script's folder is first on sys.path: scripts/evaluate.py would be what `import evaluate` finds."""
    installed = importlib.metadata.packages_distributions()
    assert section(script) not in {*sys.stdlib_module_names, *installed, "evaluate", "tokenizers", "trackio", "wandb"}
