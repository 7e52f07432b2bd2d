"""The two scripts that come before training: what they make, what they say, and how they refuse."""

import ast
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from gpt2x.shards.index import load_index

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs a script in tmp_path, in this process: its exit code, what it printed, and what it complained."""

    def run_script(script: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        for name in ("stdout", "stderr"):  # which a script replaces by streams of its own
            monkeypatch.setattr(sys, name, getattr(sys, name))
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code
        return code, *capfd.readouterr()

    return run_script


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Thirty small documents, as command line arguments."""
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"document {number} says that {number} times {number} is {number**2}")
    return ["--corpus.kind=files", f'--corpus.paths=["{tmp_path}/*.txt"]', "--corpus.validation_fraction=0.3"]


@pytest.fixture
def tokenizer() -> list[str]:
    return ["--tokenizer.path=tokenizer", "--tokenizer.vocab_size=280"]


def test_preparing_says_what_was_made_and_how_to_go_on(run, tmp_path, corpus, tokenizer):
    code, printed, complaints = run("prepare_data.py", *corpus, *tokenizer, "--output_dir=shards")
    assert (code, complaints) == (0, "training a tokenizer of 280 tokens into tokenizer\n")
    assert (tmp_path / "shards" / "index.json").is_file()
    assert printed.startswith("train: ")
    assert printed.endswith("scripts/pretrain.py --data.path shards\n")


def test_a_tokenizer_trained_first_is_the_one_that_preparing_uses(run, tmp_path, corpus, tokenizer):
    _, printed, _ = run("train_tokenizer.py", *corpus, *tokenizer)
    assert printed.startswith("tokenizer of 280 ids: tokenizer\n")
    saved = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    *_, command = printed.strip().split("\n")[1].partition("scripts/")
    script, *arguments = shlex.split(command.replace("DIRECTORY", "shards"))
    assert run(script, *arguments)[0] == 0
    assert load_index(tmp_path / "shards").recipe["paths"] == [f"{tmp_path}/*.txt"]
    assert (tmp_path / "shards" / "tokenizer" / "tokenizer.json").read_bytes() == saved


@pytest.mark.parametrize("script", ["prepare_data.py", "train_tokenizer.py"])
def test_a_users_mistake_is_one_line_and_exit_code_1(run, script, tokenizer):
    output_dir = ["--output_dir=shards"] if script == "prepare_data.py" else []
    paths = ["--corpus.kind=files", '--corpus.paths=["none.txt"]']
    expected = "error: corpus.paths: 'none.txt' matches no file; correct the path, or quote the pattern.\n"
    assert run(script, *paths, *tokenizer, *output_dir) == (1, "", expected)


@pytest.mark.parametrize("script", ["prepare_data.py", "train_tokenizer.py"])
@pytest.mark.parametrize("arguments", [["--help"], ["--tokenizer.vocab_sise=9"]])
def test_help_and_mistakes_in_a_recipe_are_answered_before_anything_heavy_is_imported(tmp_path, script, arguments):
    code = (
        "import atexit, runpy, sys;"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules))));"
        f"sys.argv = {[script, *arguments]!r};"
        f"runpy.run_path({str(ROOT / 'scripts' / script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n")
    assert done.returncode == (0 if arguments == ["--help"] else 2)


def test_both_scripts_have_the_same_default_corpus():
    """Else the tokenizer would be trained on documents that the preparation then holds out."""
    flags = runpy.run_path(str(ROOT / "scripts" / "train_tokenizer.py"))["DEFAULT_CORPUS"]
    recipe = yaml.safe_load((ROOT / "configuration" / "data" / "python-stdlib.yaml").read_text())
    assert sorted(flags) == sorted(f"--corpus.{field}={value}" for field, value in recipe["corpus"].items())


def test_the_words_that_say_which_corpus_it_is_are_all_passed_on_and_no_others():
    corpus_arguments = runpy.run_path(str(ROOT / "scripts" / "train_tokenizer.py"))["corpus_arguments"]
    corpus = [
        "--corpus.streaming",
        "--corpus.paths",
        '["a b"]',
        r"--corpus.document_separator=\n",
        "--corpus.kind",
        "files",
    ]
    tokenizer = ["--tokenizer.path", "tok", "--tokenizer.vocab_size=300"]
    for words in ([*corpus, *tokenizer], [*corpus[:1], *tokenizer, *corpus[1:]], [*tokenizer, *corpus]):
        assert corpus_arguments(words) == corpus


def test_the_default_recipe_is_found_from_any_directory(run):
    code, _, complaint = run("prepare_data.py", "--tokens_per_shard=0")
    assert code == 2
    assert "tokens_per_shard (0) must be a whole number from 1 to" in complaint


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ([], "output_dir and tokenizer.path are needed; give --output_dir VALUE --tokenizer.path VALUE, "),
        (["--output_dir=shards"], "tokenizer.path is needed; give --tokenizer.path VALUE, "),
        (["--tokenizer.path=openai-community/gpt2"], "output_dir is needed; give --output_dir VALUE, "),
    ],
)
def test_a_corpus_of_ones_own_has_no_hidden_base(run, tmp_path, corpus, given, missing):
    before = sorted(tmp_path.iterdir())
    code, printed, complaint = run("prepare_data.py", *corpus, *given)
    assert (code, printed) == (2, "")
    assert complaint.startswith(f"prepare_data.py: error: {missing}or a recipe that has it by --config.")
    assert complaint.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_tokenizer_that_is_named_is_not_trained(run, tmp_path, corpus):
    """What the second command of docs/data.md says; the Hub cannot be reached here, and no tokenizer is made up."""
    arguments = ["--tokenizer.path=openai-community/gpt2", "--output_dir=shards"]
    code, _, complaint = run("prepare_data.py", *corpus, *arguments)
    assert code == 1
    assert "openai-community/gpt2" in complaint
    assert not (tmp_path / "openai-community").exists()


def test_preparing_again_says_that_it_is_done_and_for_other_texts_is_refused(run, tmp_path, corpus, tokenizer):
    _, first, _ = run("prepare_data.py", *corpus, *tokenizer, "--output_dir=shards")
    code, printed, _ = run("prepare_data.py", *corpus, *tokenizer, "--output_dir=shards")
    line, _, rest = printed.partition("\n")
    assert (code, rest) == (0, first)
    assert re.fullmatch(r"shards: already prepared on \d{4}-\d\d-\d\d from 30 files \([\d,]+ tokens\)", line)
    (tmp_path / "99.txt").write_text("one more")
    code, printed, complaint = run("prepare_data.py", *corpus, *tokenizer, "--output_dir=shards")
    assert (code, printed, complaint.count("\n")) == (1, "", 1)
    assert re.match(
        r"error: 'shards' was prepared on .* from other texts \(.*/99.txt is new\); set another", complaint
    )


def test_statistics_of_a_damaged_shard_are_one_line(run, tmp_path, corpus, tokenizer):
    run("prepare_data.py", *corpus, *tokenizer, "--output_dir=shards")
    shard = tmp_path / "shards" / "train" / "tokens_part_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    code, _, complaint = run("prepare_data.py", *corpus, *tokenizer, "--output_dir=shards")
    assert (code, complaint.count("\n")) == (1, 1)
    assert re.match(r"error: shards/train/tokens_part_00000.safetensors: expected \d+ bytes, found \d+; ", complaint)


def test_parts_made_one_by_one_are_finished_by_the_plain_command(run, tmp_path, corpus, tokenizer):
    run("train_tokenizer.py", *corpus, *tokenizer)
    arguments = [*corpus, *tokenizer, "--num_tasks=3", "--num_workers=1"]
    code, printed, _ = run("prepare_data.py", *arguments, "--output_dir=parts", "--task=1")
    assert (code, printed.split(";")[0]) == (0, "task 1 of 3 is finished")
    made = sorted(file.name for file in (tmp_path / "parts").rglob("*.safetensors"))
    assert set(made) == {"tokens_part_00001.safetensors"}
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "parts").rglob("*.safetensors")}
    assert run("prepare_data.py", *arguments, "--output_dir=parts")[0] == 0
    assert before == {file: file.stat().st_mtime_ns for file in before}, "the finished part was left alone"
    assert run("prepare_data.py", *arguments, "--output_dir=whole")[0] == 0
    parts, whole = (tmp_path / name / "index.json" for name in ("parts", "whole"))
    assert parts.read_bytes() == whole.read_bytes()


def test_a_part_alone_needs_the_tokenizer_first(run, corpus, tokenizer):
    code, _, complaint = run("prepare_data.py", *corpus, *tokenizer, "--output_dir=shards", "--task=0")
    assert code == 1
    assert complaint.startswith(
        "error: tokenizer does not exist; give a tokenizer's directory (scripts/train_tokenizer.py"
    )


def test_a_part_that_does_not_exist_is_refused(run, corpus, tokenizer):
    code, _, complaint = run("prepare_data.py", *corpus, *tokenizer, "--output_dir=shards", "--task=1")
    expected = "error: task (1) must be at least 0 and below num_tasks (1); correct it.\n"
    assert (code, complaint) == (1, expected)


def test_the_statistics_name_the_longest_document_and_what_was_left_out(run, tmp_path, corpus, tokenizer):
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    _, printed, _ = run("prepare_data.py", *corpus, *tokenizer, "--output_dir=shards")
    lines = printed.splitlines()
    assert re.search(r"^train: \d+ documents, .* bytes per token, the longest document \d+ tokens$", lines[0])
    assert lines[2] == "left out: 1 empty, 1 not UTF-8"


def rows_of(recipe: str) -> list[dict]:
    """Rows of the shape that the recipe's dataset has on the Hub."""
    texts = [f"document {number} says that {number} times {number} is {number**2}" for number in range(60)]
    if recipe in ("smol-smoltalk", "smol-smoltalk-chat"):
        chats = [[{"role": "user", "content": "How much?"}, {"role": "assistant", "content": text}] for text in texts]
        return [{"messages": chat, "source": "smol-magpie-ultra"} for chat in chats]
    if recipe == "wikitext":
        return [
            {"text": text} for pair in ((" = A headline = \n", ""), *((text, "") for text in texts)) for text in pair
        ]
    return [{"text": text, "id": str(number), "score": 3.5} for number, text in enumerate(texts)]


@pytest.mark.parametrize("recipe", ["openwebtext", "fineweb-edu", "smol-smoltalk", "smol-smoltalk-chat", "wikitext"])
def test_a_recipe_of_the_hub_prepares_rows_of_that_shape(run, tmp_path, monkeypatch, tokenizer, recipe):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    table = pyarrow.Table.from_pylist(rows_of(recipe))
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    local = [
        "--corpus.dataset=parquet",
        "--corpus.dataset_config=null",
        f'--corpus.data_files=["{tmp_path}/*.parquet"]',
    ]
    config = ["--config", str(ROOT / "configuration" / "data" / f"{recipe}.yaml")]
    fields = ["--corpus.validation_fraction=0.3", "--num_workers=1", "--num_tasks=2"]
    if recipe.endswith("-chat"):  # its template is named from the repository's root, where the command is to be given
        fields.append(f"--chat.template={ROOT / 'tokenization' / 'chatml.jinja'}")
    code, printed, complaint = run("prepare_data.py", *config, *local, *fields, *tokenizer)
    assert code == 0, complaint
    length = r" --data.sequence_length \d+" if recipe.endswith("-chat") else ""
    assert re.search(rf"--data.path data/{recipe}{length}\n$", printed)
    index = load_index(tmp_path / "data" / recipe)
    assert index.total("train", "num_documents") + index.total("validation", "num_documents") == 60 + (
        recipe == "wikitext"
    )
    assert index.dropped == ({"empty": 61} if recipe == "wikitext" else {})


def test_conversations_are_prepared_as_the_script_says_and_one_is_shown(run, tmp_path, tokenizer):
    """The command of the script's docstring, from the root of a copy of what it names."""
    (tmp_path / "tokenization").symlink_to(ROOT / "tokenization")
    (tmp_path / "configuration").symlink_to(ROOT / "configuration")
    rows = [
        {"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "Yes!"}]} for n in range(99)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    docstring = ast.get_docstring(ast.parse((ROOT / "scripts" / "prepare_data.py").read_text()))
    (command,) = re.findall(r"scripts/(prepare_data.py .*-chat.yaml[^\n]*\n.*)", docstring)
    script, *arguments = shlex.split(command.replace("\\\n", " "))
    code, printed, complaint = run(script, *arguments, *tokenizer, "--num_workers=1")
    assert code == 0, complaint
    lines = printed.splitlines()
    assert re.match(r"train: \d\d conversations, [\d,]+ tokens in ", lines[0])
    assert lines[3:8] == [
        "the first training document; what is learned stands between ⟦ and ⟧:",
        "<|im_start|>user",
        lines[5],
        "<|im_start|>assistant",
        "⟦Yes!<|im_end|>⟧",
    ]
    assert re.match(r"\d+\?<\|im_end\|>$", lines[5])
    assert re.match(
        r"learned: [\d,]+ of [\d,]+ tokens \(\d+\.\d%\), in \d\d documents; the longest has \d+ tok", lines[8]
    )
    command = "scripts/finetune.py --init_from MODEL --data.path data/chats --data.sequence_length 1024"
    assert lines[-1].endswith(command)
    assert load_index(tmp_path / "data" / "chats").recipe["chat"]["end_of_turn"] == "<|im_end|>"


def test_conversations_that_a_recipe_cannot_hold_are_refused_in_one_line(run, tokenizer):
    code, _, complaint = run("prepare_data.py", *tokenizer, "--output_dir=shards", "--chat.learn=all")
    assert code == 2
    assert complaint.endswith(
        "corpus.kind (python_stdlib) has no conversations; with chat set it to files or dataset.\n"
    )


def test_the_command_after_a_training_names_the_whole_corpus(run, tmp_path, tokenizer):
    (tmp_path / "it's [1].txt").write_text("\n".join(f"document {number} of {number**3}" for number in range(300)))
    corpus = ["--corpus.kind=files", '--corpus.paths=["it\'s [1].txt"]', r"--corpus.document_separator=\n"]
    _, printed, _ = run("train_tokenizer.py", *corpus, "--corpus.validation_fraction=0.3", *tokenizer)
    *_, command = printed.strip().split("\n")[1].partition("scripts/")
    script, *arguments = shlex.split(command.replace("DIRECTORY", "shards"))
    assert run(script, *arguments)[0] == 0
    made = load_index(tmp_path / "shards")
    assert (made.recipe["paths"], made.recipe["document_separator"]) == (["it's [1].txt"], "\n")
    assert made.total("train", "num_documents") + made.total("validation", "num_documents") == 300


def test_preparing_says_what_it_passes_over_in_a_folder(run, tmp_path, corpus, tokenizer):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt", "c.png"):
        (tmp_path / "in" / name).write_text("the only text there is " * 20)
    flags = ["--corpus.kind=files", "--corpus.paths=[in]", "--corpus.validation_fraction=0"]
    _, _, complaints = run("prepare_data.py", *flags, *tokenizer, "--tokenizer.vocab_size=262", "--output_dir=shards")
    assert complaints.endswith("corpus.paths: files of other kinds are passed over: 1 .png\n")
