"""Model cards: written from what a run left, read by the Hub's own parser."""

import json
import os
import re
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from published_models import random_model
from transformers import AutoTokenizer

from gpt2x.adapters import add_adapters, save_adapters
from gpt2x.config import LoraSection
from gpt2x.errors import UserError
from gpt2x.publishing.model_card import model_card

RECIPE = {
    "run": {"name": "tiny", "seed": 1337},
    "data": {
        "path": None,
        "preparation": {
            "output_dir": "/home/somebody/shards",
            "corpus": {"kind": "files", "paths": ["/home/somebody/*.txt", "texts/*.txt"]},
        },
        "sequence_length": 128,
    },
    "train": {"max_steps": 10, "tokens_per_step": 4096, "torch_compile": True},
    "optimizer": {"name": "muon", "learning_rate": 0.016, "lr_scheduler_type": "wsd"},
    "init_from": None,
}
STATS = {
    "tokens": 40960,
    "parameters": 27136,
    "steps": 10,
    "val/loss": 3.25,
    "val/bits_per_byte": 1.5,
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def run_dir(tmp_path, saved):
    directory = tmp_path / "runs" / "tiny"
    (directory / "plots").mkdir(parents=True)
    (directory / "plots" / "loss.png").write_bytes(b"\x89PNG")
    saved("llama").rename(directory / "final")
    (directory / "config.yaml").write_text(yaml.safe_dump(RECIPE))
    (directory / "stats.json").write_text(json.dumps(STATS))
    records = [{"step": 5, "val/token_accuracy": 0.25}, {"step": 10, "val/token_accuracy": 0.5}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def card_of(directory, **options):
    return ModelCard(model_card(directory, **{"repo_id": "user/tiny", "license": "mit", **options}))


def rows(card, section):
    body = card.text.split(f"## {section}\n")[1].split("\n## ")[0]
    cells = [line.strip("|").split("|") for line in body.splitlines() if line.startswith("|")][2:]
    return {label.strip(): value.strip() for label, value in cells}


def test_its_metadata_says_what_the_hub_shows(run_dir):
    metadata = card_of(run_dir).data.to_dict()
    assert metadata["license"] == "mit"
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["tags"] == ["gpt2x", "llama"]
    results = metadata["model-index"][0]["results"][0]["metrics"]
    assert {result["type"]: result["value"] for result in results} == {
        "loss": 3.25,
        "bits_per_byte": 1.5,
        "token_accuracy": 0.5,
    }


def test_a_licence_that_nobody_gave_is_on_no_card(run_dir):
    card = card_of(run_dir, license=None)
    assert "license" not in card.data.to_dict()
    assert "licen" not in card.content.lower()


def test_its_tables_hold_architecture_data_schedule_and_evaluation(run_dir):
    card = card_of(run_dir)
    assert rows(card, "Architecture") | {"layers": "2", "width": "32", "key and value heads": "2"} == rows(
        card, "Architecture"
    )
    assert rows(card, "Data") == {
        "preparation.output_dir": "shards",
        "preparation.corpus.kind": "files",
        "preparation.corpus.paths": "*.txt, texts/*.txt",
        "sequence_length": "128",
    }
    training = rows(card, "Training")
    assert training["tokens seen"] == "40,960"
    assert training["optimizer.lr_scheduler_type"] == "wsd"
    assert training["train.torch_compile"] == "yes"
    assert training["version of torch"] == "2.13.0"
    assert rows(card, "Evaluation") == {
        "validation, cross-entropy (nats per token)": "3.25",
        "validation, bits per byte": "1.5",
        "validation, token accuracy": "0.5",
    }
    assert "![loss](plots/loss.png)" in card.text


def test_a_mixture_is_shown_source_by_source(run_dir):
    sources = [
        {"name": "web", "path": "/home/somebody/web", "weight": 0.7, "stream": None},
        {"name": "code", "path": "data/code", "weight": 0.3},
    ]
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**RECIPE, "data": {"sources": sources}}))
    assert rows(card_of(run_dir), "Data") == {
        "sources.web.name": "web",
        "sources.web.path": "web",
        "sources.web.weight": "0.7",
        "sources.code.name": "code",
        "sources.code.path": "data/code",
        "sources.code.weight": "0.3",
    }


def test_evaluations_are_shown_with_their_standard_errors(run_dir):
    scores = {"acc": 0.25, "acc_norm": 0.5, "acc_stderr": 0.0125, "num_items": 500}
    (run_dir / "stats.json").write_text(json.dumps({**STATS, "evaluation": {"hellaswag": scores}}))
    table = rows(card_of(run_dir), "Evaluation")
    assert table["hellaswag, acc"] == "0.2500 ± 0.0125"
    assert table["hellaswag, acc_norm"] == "0.5000"
    assert "hellaswag, num_items" not in table


def test_paths_of_ones_own_machine_stay_there(run_dir):
    assert "somebody" not in card_of(run_dir).content
    assert str(run_dir) not in card_of(run_dir).content


def test_the_final_model_of_a_run_has_the_runs_card(run_dir):
    assert card_of(run_dir / "final").content == card_of(run_dir).content


def test_a_bare_model_has_a_card_of_what_is_known(saved):
    card = card_of(saved("gpt2"))
    assert rows(card, "Architecture")["longest sequence"] == "128"
    assert "`GPT2LMHeadModel`" in card.text
    assert "## Training" not in card.text
    assert "## Evaluation" not in card.text
    assert "model-index" not in card.data.to_dict()


@pytest.mark.parametrize(("form", "is_remote"), [("llama", False), ("gpt2x", True)])
def test_it_says_how_to_load_the_model(saved, form, is_remote):
    card = card_of(saved(form))
    assert 'AutoModelForCausalLM.from_pretrained("user/tiny"' in card.text
    assert ('"user/tiny", trust_remote_code=True)' in card.text) == is_remote


@pytest.mark.parametrize(
    ("init_from", "base"), [("openai-community/gpt2", "openai-community/gpt2"), ("runs/x/final", None)]
)
def test_a_model_that_was_continued_names_the_one_on_the_hub_it_came_from(run_dir, init_from, base):
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**RECIPE, "init_from": init_from}))
    assert card_of(run_dir).data.to_dict().get("base_model") == base


def test_a_model_made_of_a_run_names_what_that_run_started_from(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "base")
    (tmp_path / "base" / "config.yaml").write_text(yaml.safe_dump({"init_from": "openai-community/gpt2"}))
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**RECIPE, "init_from": str(tmp_path / "base")}))
    assert card_of(run_dir).data.base_model == "openai-community/gpt2"
    (tmp_path / "base" / "config.yaml").write_text(yaml.safe_dump({"init_from": str(tmp_path / "base")}))
    assert card_of(run_dir).data.base_model is None


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def give_chat_template(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer


def run_code(card, **names):
    """Runs the card's code blocks, one after the other, with other names of the repositories."""
    found = {}
    for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        for name, path in names.items():
            block = block.replace(f'"{name}"', f'"{path}"')
        exec(block.replace("max_new_tokens=256", "max_new_tokens=3, do_sample=False"), found)
    return found


def test_a_model_that_chats_comes_with_code_that_does(run_dir, capsys):
    tokenizer = give_chat_template(run_dir / "final")
    card = card_of(run_dir)
    assert (
        f"`{tokenizer.eos_token}` ends a turn. transformers' pipelines read the text of a special token" in card.text
    )
    found = run_code(card, **{"user/tiny": run_dir / "final"})
    ids = tokenizer.apply_chat_template(found["messages"], add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    answer = found["model"].generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    assert capsys.readouterr().out == tokenizer.decode(answer, skip_special_tokens=True) + "\n"


def test_a_model_without_a_chat_template_has_nothing_to_say_of_chats(run_dir):
    assert "## Chat" not in card_of(run_dir).text


@pytest.fixture
def adapted(run_dir, saved):
    """The run's final model replaced by adapters for a model in another directory: (run, model, tokenizer, base)."""
    base = saved("gpt2").rename(run_dir.parent / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = random_model("gpt2")
    plain.name_or_path = plain.config._name_or_path = str(base)
    model = add_adapters(plain, LoraSection(rank=2, target_modules=["c_attn", "c_fc"]), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    shutil.rmtree(run_dir / "final")
    save_adapters(model, run_dir / "final", tokenizer)
    return run_dir, model, base


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it by its old name
@pytest.mark.parametrize("place", [".", "final"])
def test_adapters_are_loaded_through_peft_beside_their_base(adapted, place):
    run_dir, model, base = adapted
    card = card_of(run_dir / place)
    assert card.data.library_name == "peft"
    assert card.data.tags == ["gpt2x", "lora", "gpt2"]
    assert card.data.base_model is None
    assert "`BASE` is the directory of the model that the adapters were trained on." in card.text
    assert str(base) not in card.content
    architecture = rows(card, "Architecture")
    assert (architecture["width"], architecture["rank of the adapters"]) == ("32", "2")
    assert architecture["adapted layers"] == "c_attn, c_fc"
    found = run_code(card, **{"user/tiny": run_dir / "final", "BASE": base})
    ids = torch.arange(12)[None]
    torch.testing.assert_close(found["model"](ids).logits, model.eval()(ids).logits)


def test_adapters_for_a_model_on_the_hub_name_it(adapted):
    run_dir, _, _ = adapted
    file = run_dir / "final" / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": "openai-community/gpt2"}
    file.write_text(json.dumps(settings))
    card = card_of(run_dir)
    assert card.data.base_model == "openai-community/gpt2"
    assert 'base = AutoModelForCausalLM.from_pretrained("openai-community/gpt2")' in card.text
    assert "BASE" not in card.text
    assert rows(card, "Architecture")["rank of the adapters"] == "2"


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_text('{"tokens": [1'),
    "bytes": lambda file: file.write_bytes(b"\xff\x00{"),
    "deep": lambda file: file.write_text("[" * 100_000),
    "digits": lambda file: file.write_text('{"tokens": ' + "9" * 5_000 + "}"),
    "list": lambda file: file.write_text("[1, 2]"),
    "directory": lambda file: (file.unlink(), file.mkdir()),
    "fifo": lambda file: (file.unlink(), os.mkfifo(file)),
    "dangling": lambda file: (file.unlink(), file.symlink_to("nowhere")),
    "device": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["config.yaml", "stats.json"])
def test_a_damaged_description_of_the_run_is_passed_over_with_a_line(run_dir, capsys, name, damage):
    damage(run_dir / name)
    card = card_of(run_dir)
    assert re.fullmatch(rf"passed over: {run_dir / name} [^\n]*\n", capsys.readouterr().err)
    assert rows(card, "Architecture")["width"] == "32"
    assert ("## Data" in card.text) == (name != "config.yaml")
    assert ("tokens seen" in card.text) == (name != "stats.json")


@pytest.mark.parametrize("damage", ["directory", "fifo", "dangling", "device"])
def test_metrics_that_are_no_file_are_passed_over_with_a_line(run_dir, capsys, damage):
    DAMAGE[damage](run_dir / "metrics.jsonl")
    assert "validation, token accuracy" not in rows(card_of(run_dir), "Evaluation")
    assert capsys.readouterr().err.startswith(f"passed over: {run_dir / 'metrics.jsonl'} ")


def test_of_damaged_metrics_the_records_that_are_whole_are_shown(run_dir, capsys):
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"val/token_ac\xff\n{"step": 15, "val/token_accuracy": 0.75}\n{"step": 20, "val/to')
    assert rows(card_of(run_dir), "Evaluation")["validation, token accuracy"] == "0.75"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "train: [1, 2]"),
        ("config.yaml", "init_from: {a: 1}"),
        ("config.yaml", "data: text"),
        ("stats.json", '{"versions": [1]}'),
        ("stats.json", '{"evaluation": {"hellaswag": 0.5}}'),
    ],
)
def test_a_description_of_another_shape_is_passed_over_with_a_line(run_dir, capsys, name, content):
    (run_dir / name).write_text(content)
    assert "## Architecture" in card_of(run_dir).text
    assert capsys.readouterr().err.startswith(f"passed over: {run_dir / name} is not as gpt2x writes it")


@pytest.mark.parametrize("damage", ["empty", "cut", "bytes", "deep", "list"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_damaged_description_of_the_model_is_refused_in_one_line(run_dir, name, damage):
    DAMAGE[damage](run_dir / "final" / name)
    with pytest.raises(UserError, match=rf"^[^\n]*{re.escape(name)} is no[^\n]*$"):
        card_of(run_dir)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{}"),
        ("config.json", '{"model_type": 3}'),
        ("config.json", '{"model_type": "llama", "architectures": "Llama"}'),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("tokenizer_config.json", '{"eos_token": {"text": "<end>"}}'),
    ],
)
def test_a_description_of_the_model_of_another_shape_is_refused_in_one_line(run_dir, name, content):
    (run_dir / "final" / name).write_text(content)
    with pytest.raises(UserError, match=rf"^[^\n]*{re.escape(name)} is not as gpt2x writes it[^\n]*$"):
        card_of(run_dir)
