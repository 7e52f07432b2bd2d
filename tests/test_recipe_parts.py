"""A recipe is put together from its files, null is null, no key stands twice, and a path means what its place says."""

import os
import re
from pathlib import Path

import pytest
import yaml

from gpt2x.command_line import parse_recipe
from gpt2x.config import FinetuneRecipe, GenerationRecipe, PreparationRecipe, Recipe, to_yaml
from gpt2x.config.parts import load_yaml
from gpt2x.runs.changes import changes_between

ROOT = Path(__file__).parents[1]
CHAT = ROOT / "configuration" / "finetune" / "chat.yaml"
PREPARATION = {"output_dir": "out", "tokenizer": {"path": "tok"}, "corpus": {"kind": "files", "paths": ["a.jsonl"]}}
FLAGS = ["--output_dir", "out", "--tokenizer.path", "tok", "--corpus.kind", "files", "--corpus.paths", "[a.jsonl]"]


def prepared(*argv: str | Path) -> PreparationRecipe:
    return parse_recipe(PreparationRecipe, [str(argument) for argument in argv], script="x.py")[0]


def complaint(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    with pytest.raises(SystemExit, match="2"):
        prepared(*argv)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.removeprefix("x.py: error: ").rstrip("\n")


def write(file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


# --- no key twice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("output_dir: a\ntokenizer: {path: x}\noutput_dir: b\n", "'output_dir' stands twice, in lines 1 and 3"),
        ("output_dir: a\ntokenizer:\n  path: x\n  path: x\n", "'path' stands twice, in lines 3 and 4"),
        ("corpus: {kind: files, paths: [a], kind: files}\n", "'kind' stands twice, in lines 1 and 1"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_file_and_lines(capsys, tmp_path, text, lines):
    file = write(tmp_path / "x.yaml", text)
    assert complaint(capsys, "--config", file) == f"{file}: {lines}; keep one of them."


def test_a_key_twice_in_a_section_of_its_own_names_that_file(capsys, tmp_path):
    section = write(tmp_path / "t.yaml", "path: x\npath: y\n")
    file = write(tmp_path / "x.yaml", PREPARATION | {"tokenizer": "t.yaml"})
    assert complaint(capsys, "--config", file).startswith(f"{section}: 'path' stands twice, in lines 1 and 2;")


def test_a_key_twice_in_a_mapping_on_the_command_line_is_refused(capsys):
    assert complaint(capsys, *FLAGS, "--tokenizer", "{path: a, path: b}").startswith("'path' stands twice, in lines 1")


def test_keys_that_are_merged_or_given_again_elsewhere_are_no_repetition():
    text = "a: &a {x: 1, <<: &b {x: 2, y: 3}}\nc: {<<: *a, x: 5}\nd: {<<: *b, y: 1}\n"
    assert load_yaml(text) == yaml.safe_load(text) == {
        "a": {"x": 1, "y": 3},
        "c": {"x": 5, "y": 3},
        "d": {"x": 2, "y": 1},
    }  # fmt: skip


def test_numbers_are_read_as_on_the_command_line(tmp_path):
    write(tmp_path / "x.yaml", "data: {path: x}\ntrain: {max_steps: 3, max_grad_norm: 1e-3}\n")
    recipe, _ = parse_recipe(Recipe, ["--config", str(tmp_path / "x.yaml")], script="x.py")
    flags = ["--data.path=x", "--train.max_steps=3", "--train.max_grad_norm=1e-3"]
    assert recipe == parse_recipe(Recipe, flags, script="x.py")[0]
    assert recipe.train.max_grad_norm == 0.001


@pytest.mark.parametrize(
    "text", ["2020-01-01", "1e-3", "---", "# x", "no", "{a: 1, a: 2}", "ü\u2028\x85\u0301🙂\t\n", "~"]
)
def test_a_text_in_quotes_is_that_text(tmp_path, text):
    content = PREPARATION | {"corpus": {**PREPARATION["corpus"], "document_separator": text}}
    file = write(tmp_path / "x.yaml", yaml.safe_dump(content, default_style='"'))
    assert yaml.safe_load(file.read_text()) == content
    assert prepared("--config", file).corpus.document_separator == text


# --- null ------------------------------------------------------------------------------------------------------------

NULLS = [
    ("data.preparation.chat.template", lambda recipe: recipe.data.preparation.chat.template),
    ("data.preparation.chat.end_of_turn", lambda recipe: recipe.data.preparation.chat.end_of_turn),
    ("data.preparation.chat.max_length", lambda recipe: recipe.data.preparation.chat.max_length),
    ("data.preparation.num_workers", lambda recipe: recipe.data.preparation.num_workers),
    ("data.preparation.tokenizer.vocab_size", lambda recipe: recipe.data.preparation.tokenizer.vocab_size),
    ("data.path", lambda recipe: recipe.data.path),
    ("data.stream", lambda recipe: recipe.data.stream),
    ("run.name", lambda recipe: recipe.run.name),
    ("lora", lambda recipe: recipe.lora),
    ("train.max_grad_norm", lambda recipe: recipe.train.max_grad_norm),
    ("evaluation.hellaswag", lambda recipe: recipe.evaluation.hellaswag),
]


@pytest.mark.parametrize(("field", "value"), NULLS, ids=[field for field, _ in NULLS])
@pytest.mark.parametrize("joined", [True, False])
def test_null_is_null_in_every_optional_field(field, value, joined):
    words = [f"--{field}=null"] if joined else [f"--{field}", "null"]
    recipe, _ = parse_recipe(FinetuneRecipe, words, script="x.py", default_config=CHAT)
    assert value(recipe) is None


# --- where parts lie -------------------------------------------------------------------------------------------------


def test_a_part_lies_beside_the_file_that_names_it_and_data_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "cwd" / "mine.jinja", "wrong").parent)
    write(tmp_path / "recipes" / "data" / "mine.jinja", "right")
    write(tmp_path / "recipes" / "tok" / "t.yaml", {"path": "there"})
    chat = {"template": "mine.jinja"}
    write(tmp_path / "recipes" / "data" / "p.yaml", PREPARATION | {"chat": chat, "tokenizer": "../tok/t.yaml"})
    run = {"data": {"preparation": "data/p.yaml"}, "train": {"max_steps": 1}}
    file = write(tmp_path / "recipes" / "run.yaml", run)
    recipe, _ = parse_recipe(Recipe, ["--config", os.path.relpath(file)], script="x.py")
    preparation = recipe.data.preparation
    assert preparation.chat.template.read_text() == "right"
    assert (preparation.output_dir, preparation.tokenizer.path) == (Path("out"), "there")
    assert preparation.corpus.paths == ["a.jsonl"]
    # Written down for a run, it means the same wherever it is read.
    written = write(tmp_path / "elsewhere" / "config.yaml", to_yaml(recipe))
    monkeypatch.chdir(tmp_path)
    assert parse_recipe(Recipe, ["--config", str(written)], script="x.py")[0] == recipe


def test_a_template_on_the_command_line_lies_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "mine.jinja", "right").parent)
    assert prepared(*FLAGS, "--chat.template", "mine.jinja").chat.template == tmp_path / "mine.jinja"


@pytest.mark.parametrize("place", ["recipe", "flag"])
def test_a_shipped_part_is_found_from_everywhere_and_is_the_same_part_on_every_machine(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    recipe = PREPARATION | {"tokenizer": "tokenization/python-bpe.yaml"}
    chat = {"template": "tokenization/chatml.jinja"}
    file = write(tmp_path / "x.yaml", recipe | {"chat": chat} if place == "recipe" else recipe)
    flags = ["--chat.template", str(ROOT / "tokenization" / "chatml.jinja")] if place == "flag" else []
    found = prepared("--config", file, *flags)
    assert found.chat.template == Path("tokenization/chatml.jinja")
    expected = yaml.safe_load((ROOT / "tokenization" / "python-bpe.yaml").read_text())
    assert found.tokenizer.vocab_size == expected["vocab_size"]


def test_a_shipped_recipe_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepared("--config", "configuration/data/python-stdlib.yaml").corpus.kind == "python_stdlib"


def test_a_part_that_is_nowhere_is_refused_with_the_file_that_names_it(capsys, tmp_path):
    file = write(tmp_path / "x.yaml", PREPARATION | {"tokenizer": "none.yaml"})
    line = complaint(capsys, "--config", file)
    assert line == f"{file}: tokenizer (none.yaml) is no file beside it, and none that gpt2x has; correct the path."


def test_a_part_that_holds_no_fields_is_refused(capsys, tmp_path):
    part = write(tmp_path / "t.yaml", "- path\n")
    file = write(tmp_path / "x.yaml", PREPARATION | {"tokenizer": "t.yaml"})
    assert complaint(capsys, "--config", file).startswith(f"{part} must hold fields and their values, as in ")


def test_a_recipe_in_utf_16_is_refused_and_one_with_a_byte_order_mark_is_read(capsys, tmp_path):
    file = write(tmp_path / "x.yaml", PREPARATION)
    expected, text = prepared("--config", file), file.read_text()
    file.write_text(text, encoding="utf-8-sig")
    assert prepared("--config", file) == expected
    file.write_text(text, encoding="utf-16")
    assert complaint(capsys, "--config", file) == f"{file} is not UTF-8; save it as UTF-8."


@pytest.mark.parametrize("place", ["recipe", "flag"])
def test_a_tilde_is_the_home_directory_in_every_path(tmp_path, monkeypatch, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    fields = {"output_dir": "~/out", "tokenizer.path": "~/tok", "corpus.kind": "files", "corpus.paths": ["~/a b.txt"]}
    if place == "flag":
        recipe = prepared(*(f"--{name}={value}" for name, value in fields.items()))
    else:
        corpus = {"kind": "files", "paths": fields["corpus.paths"], "document_separator": "~/"}
        content = {"output_dir": "~/out", "tokenizer": {"path": "~/tok"}, "corpus": corpus}
        recipe = prepared("--config", write(tmp_path / "x.yaml", content))
        assert recipe.corpus.document_separator == "~/"
    assert (recipe.output_dir, recipe.tokenizer.path) == (tmp_path / "out", f"{tmp_path}/tok")
    assert recipe.corpus.paths == [f"{tmp_path}/a b.txt"]


# --- separators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (r"\n", "\n"), (r"\n\n", "\n\n"), (r"<|end|>\n", "<|end|>\n"), (r"\t\x1e\u2029", "\t\x1e\u2029"),
        (r"\\n", r"\n"), ("\n", "\n"), (r"\d", r"\d"), ("null", None), ("~", "~"), ("---", "---"),
    ],
)  # fmt: skip
def test_a_separator_from_a_shell_may_be_an_escape(given, meant):
    assert prepared(*FLAGS, f"--corpus.document_separator={given}").corpus.document_separator == meant


def test_help_says_where_paths_lead(capsys):
    with pytest.raises(SystemExit, match="0"):
        prepared("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert re.search("parts of a recipe .* lie beside the file that names them, or else among those that come", text)


def test_a_prompt_that_is_nothing_to_yaml_is_text():
    arguments = ["--prompt", "# Title"]
    assert parse_recipe(GenerationRecipe, arguments, script="x.py")[0].prompt == "# Title"


def test_a_run_that_recorded_a_template_as_it_was_given_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "mine.jinja", "text").parent)
    flags = ["--data.preparation.chat.template", "mine.jinja"]
    recipe, _ = parse_recipe(FinetuneRecipe, flags, script="x.py", default_config=CHAT)
    recorded = yaml.safe_load(to_yaml(recipe))
    recorded["data"]["preparation"]["chat"]["template"] = "mine.jinja"
    assert changes_between(recorded, recipe) == {}
    recorded["data"]["preparation"]["chat"]["template"] = "ours.jinja"
    expected = ("ours.jinja", str(tmp_path / "mine.jinja"))
    assert changes_between(recorded, recipe) == {"data.preparation.chat.template": expected}
