"""A run trains on the texts that its recipe names, or says that it does not."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from gpt2x.command_line import parse_recipe
from gpt2x.config import FinetuneRecipe, Recipe
from gpt2x.errors import UserError
from gpt2x.preflight.before_torch import check_recipe
from gpt2x.shards.index import load_index

CONFIGURATION = Path(__file__).parents[2] / "configuration"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "yours"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name} {n} " * 9}) + "\n" for n in range(40))
        )


def recipe(*arguments, paths="mine.jsonl", recipe_class=Recipe, config="pretrain/quickstart.yaml"):
    """The default recipe on texts of one's own, whose output_dir is the default recipe's."""
    words = [
        *("--data.preparation.corpus.kind", "files", "--data.preparation.corpus.paths", f"[{paths}]"),
        *("--data.preparation.corpus.validation_fraction", "0.3", "--data.sequence_length", "16"),
        *("--data.preparation.tokenizer.vocab_size", "270", "--data.preparation.num_workers", "1"),
        *("--train.max_time_s", "null", "--train.max_steps", "2", "--train.tokens_per_step", "256"),
    ]
    found, _ = parse_recipe(recipe_class, [*words, *arguments], script="x.py", default_config=CONFIGURATION / config)
    return found


def check(found, run_dir="runs/new"):
    check_recipe(found, num_processes=1, run_dir=Path(run_dir))


def num_documents():
    index = load_index(Path("data/python-stdlib"))
    return sum(index.total(split, "num_documents") for split in index.splits)


def has_begun(run_dir):
    (Path(run_dir) / "checkpoints" / "step-000001").mkdir(parents=True)
    return run_dir


REMEDY = (
    r"; set another data\.preparation\.output_dir, delete that directory, or train on what it holds by "
    r"--data\.preparation null --data\.path data/python-stdlib\.$"
)


def test_a_forgotten_output_dir_is_refused_with_the_remedy(capsys):
    check(recipe())
    assert num_documents() == 40
    message = r"^'data/python-stdlib' holds data of another recipe \(paths \[mine.jsonl\] -> \[yours.jsonl\]\)"
    with pytest.raises(UserError, match=message + REMEDY):
        check(recipe(paths="yours.jsonl"))
    places = [
        "--data.preparation.output_dir",
        "data/yours",
        "--data.preparation.tokenizer.path",
        "data/yours/tokenizer",
    ]
    check(recipe(*places, paths="yours.jsonl"))
    assert Path("data/yours/index.json").is_file()


def test_another_tokenizer_with_the_default_output_dir_is_refused():
    check(recipe())
    check(recipe("--data.preparation.output_dir", "other", "--data.preparation.tokenizer.path", "data/tokenizer"))
    with pytest.raises(UserError, match=r"the tokenizer saved in 'data/python-stdlib/tokenizer' has 270; set another"):
        check(recipe("--data.preparation.tokenizer.vocab_size", "271"))


def test_a_run_of_its_own_makes_no_use_of_a_grown_text(capsys):
    check(recipe())
    with Path("mine.jsonl").open("a") as stream:
        stream.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"was prepared on .* from other texts \(mine.jsonl has changed\)" + REMEDY):
        check(recipe())
    capsys.readouterr()
    check(recipe("--data.preparation", "null", "--data.path", "data/python-stdlib"))
    assert capsys.readouterr().out == ""


def test_a_run_that_has_begun_goes_on_with_its_shards_and_says_so(capsys):
    check(recipe())
    with Path("mine.jsonl").open("a") as stream:
        stream.write('{"text": "one more"}\n')
    check(recipe(), has_begun("runs/old"))
    line = capsys.readouterr().out
    assert line.startswith("'data/python-stdlib' was prepared on ")
    assert line.endswith(
        " from other texts (mine.jsonl has changed); the run goes on with the shards that it began with.\n"
    )
    assert num_documents() == 40


def test_a_run_whose_texts_are_not_here_is_started_and_says_so(capsys):
    check(recipe())
    Path("mine.jsonl").unlink()
    check(recipe())
    assert capsys.readouterr().out.endswith("; the texts are not on this machine, and not compared\n")


def test_that_finished_shards_are_taken_is_said(capsys):
    check(recipe())
    assert capsys.readouterr().out == ""
    check(recipe())
    assert "data/python-stdlib: already prepared on " in capsys.readouterr().out
    check(recipe(), has_begun("runs/old"))
    assert capsys.readouterr().out == ""


def test_fine_tuning_refuses_a_forgotten_output_dir_too(monkeypatch):
    monkeypatch.setattr(
        "gpt2x.preflight.before_torch.find_model", lambda name: name, raising=False
    )  # there is no model
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"{n}!"}]} for n in range(40)
    ]
    for name in ("mine", "yours"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        *("--data.preparation.tokenizer.path", "tokenizer", "--data.preparation.chat.max_length", "128"),
        *("--data.preparation.chat.template", str(CONFIGURATION.parent / "tokenization" / "chatml.jinja")),
        *("--train.num_train_epochs", "null", "--data.sequence_length", "128", "--train.tokens_per_step", "2048"),
    ]

    def finetuning(paths):
        return recipe(*words, paths=paths, recipe_class=FinetuneRecipe, config="finetune/chat.yaml")

    check(finetuning("mine.jsonl"))
    message = r"'data/python-docstrings' holds data of another recipe \(paths \[mine.jsonl\] -> \[yours.jsonl\]\); "
    with pytest.raises(UserError, match=message):
        check(finetuning("yours.jsonl"))
