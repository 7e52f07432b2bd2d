"""Conversations become shards that say what of them is learned, the same bytes however that came about."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import psutil
import pytest
from chat_corpora import CHATML, ROOT, conversation, documents, hashes, single, with_chat, write_rows
from transformers import AutoTokenizer

from gpt2x.config import ChatSection, PreparationRecipe, TokenizerSection
from gpt2x.corpus.documents import open_corpus
from gpt2x.errors import UserError
from gpt2x.preparation.chats import read_chats
from gpt2x.preparation.prepare import finalize, prepare, prepare_task, prepare_tokenizer
from gpt2x.shards.index import SPLITS
from gpt2x.tokenizers.bpe import load_tokenizer


@pytest.fixture
def recipe(chat_recipe: PreparationRecipe) -> PreparationRecipe:
    return chat_recipe


def expected_documents(recipe: PreparationRecipe, tokenizer) -> dict[str, list[tuple[list[int], list[int]]]]:
    """What transformers itself makes of the conversations."""
    expected: dict = {split: [] for split in SPLITS}
    for chat in read_chats(open_corpus(recipe.corpus, print, as_chat=True), recipe.corpus, dropped=Counter()):
        found = tokenizer.apply_chat_template(
            chat.messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        expected["validation" if chat.is_validation else "train"].append(
            (found["input_ids"], found["assistant_masks"])
        )
    return expected


def test_ids_and_targets_are_those_of_transformers_own_template(recipe):
    index = prepare(recipe)
    tokenizer = AutoTokenizer.from_pretrained(index.tokenizer_dir)
    assert len(index.splits["train"]) > 2
    expected = expected_documents(recipe, tokenizer)
    for split in SPLITS:
        assert documents(index, split) == expected[split]
        assert len(expected[split]) > 2


def test_the_bytes_are_those_of_what_the_assistant_says(recipe, chats_file):
    index = prepare(recipe)
    rows = [json.loads(line)["messages"] for line in chats_file.read_text().splitlines()]
    said = [message["content"] for chat in rows for message in chat if message["role"] == "assistant"]
    assert sum(index.num_bytes(split) for split in SPLITS) == sum(len(text.encode()) for text in said)


def test_where_everything_is_learned_every_token_is_a_target(recipe):
    index = prepare(with_chat(recipe, learn="all"))
    assert all(all(targets) for split in SPLITS for _, targets in documents(index, split))


def test_the_tokenizer_that_is_saved_writes_and_ends_turns(recipe, base_tokenizer):
    index = prepare(recipe)
    tokenizer = AutoTokenizer.from_pretrained(index.tokenizer_dir)
    assert tokenizer.chat_template == CHATML.read_text()
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", index.eos_token_id)
    assert index.vocab_size == len(tokenizer) == 282
    assert len(AutoTokenizer.from_pretrained(base_tokenizer)) == 280, "the tokenizer of the recipe stays what it is"


def test_special_tokens_are_added_once_also_to_a_tokenizer_that_has_them(recipe, tmp_path):
    index = prepare(recipe)
    again = TokenizerSection(path=str(index.tokenizer_dir))
    other = prepare(dataclasses.replace(recipe, tokenizer=again, output_dir=tmp_path / "other"))
    assert other.vocab_size == 282
    assert other.splits == index.splits


def test_a_conversation_ends_as_its_template_ends_it_and_a_text_with_the_end_of_text(recipe, chats_file):
    index = prepare(recipe)
    line_end = load_tokenizer(index.tokenizer_dir)("\n")["input_ids"]
    assert all(ids[-2:] == [index.eos_token_id, *line_end] for ids, _ in documents(index, "train"))
    texts = [f"text {number} of <|im_end|>" for number in range(20)]
    write_rows(chats_file, [{"text": text} for text in texts])
    index = prepare(dataclasses.replace(recipe, output_dir=recipe.output_dir / "texts"))
    found = [document for split in SPLITS for document in documents(index, split)]
    tokenizer = load_tokenizer(index.tokenizer_dir)
    assert sorted(tokenizer.decode(ids[:-1]) for ids, _ in found) == sorted(texts)
    assert all(ids[-1] == index.eos_token_id and ids.count(index.eos_token_id) == 1 for ids, _ in found)
    assert all(all(targets) for _, targets in found)
    assert sum(index.num_bytes(split) for split in SPLITS) == sum(map(len, texts))


def test_texts_need_no_template(recipe, chats_file):
    write_rows(chats_file, [{"text": f"text {number}"} for number in range(20)])
    index = prepare(dataclasses.replace(recipe, chat=ChatSection()))
    assert index.vocab_size == 280


def test_conversations_are_cut_at_their_end_and_targets_with_them(recipe, tmp_path):
    whole = prepare(recipe)
    cut = prepare(
        with_chat(dataclasses.replace(recipe, output_dir=tmp_path / "cut"), max_length=40, drop_unlearned=True)
    )
    for split in SPLITS:
        expected = [(ids[:40], targets[:40]) for ids, targets in documents(whole, split)]
        assert documents(cut, split) == [(ids, targets) for ids, targets in expected if any(targets)]


@pytest.mark.parametrize("length", [26, 30, 41])
def test_a_conversation_cut_short_is_what_transformers_cuts(recipe, length):
    messages = conversation("Hi", "Hello!", "And you?", "Fine, 中文.")
    index = prepare(with_chat(single(recipe, *(message["content"] for message in messages)), max_length=length))
    expected = AutoTokenizer.from_pretrained(index.tokenizer_dir).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, truncation=True, max_length=length
    )
    assert len(expected["input_ids"]) == length
    assert documents(index, "train") == [(expected["input_ids"], expected["assistant_masks"])] * 3


@pytest.mark.parametrize("text", ["alpha beta gamma. " * 9, "中文中文中文中文中文"])
def test_bytes_that_are_cut_off_do_not_count(recipe, chats_file, text):
    write_rows(chats_file, [{"messages": conversation("Hi.", text)}, {"messages": conversation("Hi.", text + "x")}])
    corpus = dataclasses.replace(recipe.corpus, validation_fraction=0)
    index = prepare(with_chat(dataclasses.replace(recipe, corpus=corpus), max_length=30))
    tokenizer = load_tokenizer(index.tokenizer_dir)
    learned = [np.array(ids)[np.array(targets) == 1].tolist() for ids, targets in documents(index, "train")]
    kept = [len(tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)).encode()) for ids in learned]
    assert abs(index.num_bytes("train") - sum(kept)) <= 3 * len(kept)


UNANSWERED = {
    "nobody answers": (conversation("Hi."), {}, "for the assistant says nothing in it; remove it, or set chat.drop"),
    "nobody speaks": ([], {}, "for the assistant says nothing in it; remove it, or set chat.drop_unlearned true"),
    "the answer is cut off": (
        conversation("Hi." * 50, "Yes."),
        {"max_length": 40},
        r"in its first 40 of \d+ tokens; raise chat.max_length, or set chat.drop_unlearned true to leave such",
    ),
    "only the first token is left, which nothing predicts": (
        conversation("Hi.", "Yes."),
        {"max_length": 1, "learn": "all"},
        r"in its first 1 of \d+ tokens; raise chat.max_length",
    ),
}


@pytest.mark.parametrize("case", UNANSWERED)
def test_a_conversation_without_anything_to_learn_is_named_or_left_out_and_counted(recipe, chats_file, case):
    chat, fields, complaint = UNANSWERED[case]
    rows = [] if "learn" in fields else [{"messages": conversation(f"{n}?", "Yes.")} for n in range(9)]
    write_rows(chats_file, [*rows, {"messages": chat}])
    corpus = dataclasses.replace(recipe.corpus, validation_fraction=0)
    recipe = with_chat(dataclasses.replace(recipe, corpus=corpus), **fields)
    with pytest.raises(UserError, match=rf"chats.jsonl:{len(rows) + 1} has nothing to learn,? {complaint}"):
        prepare(recipe)
    if rows:
        index = prepare(with_chat(recipe, drop_unlearned=True))
        assert index.dropped == {"without anything to learn": 1}
        assert index.total("train", "num_documents") == 9


def test_what_the_template_refuses_is_named_by_its_row(recipe, chats_file, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text(
        CHATML.read_text() + "{%- if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"chats.jsonl:\d+: .*too long"):
        prepare(with_chat(recipe, template=template))


def test_a_tokenizer_without_a_template_is_refused(recipe):
    with pytest.raises(UserError, match=r"has no chat template"):
        prepare(dataclasses.replace(recipe, chat=ChatSection()))


@pytest.mark.parametrize("num_tasks", [pytest.param(2, marks=pytest.mark.trial), 5])
def test_the_number_of_workers_and_the_order_of_tasks_change_no_byte(recipe, tmp_path, num_tasks):
    recipe = with_chat(dataclasses.replace(recipe, num_tasks=num_tasks), max_length=30, drop_unlearned=True)
    prepare(recipe)
    others = [dataclasses.replace(recipe, output_dir=tmp_path / name, num_workers=2) for name in ("two", "backwards")]
    if num_tasks == 2:
        prepare(others[0])
        assert hashes(others[0].output_dir) == hashes(recipe.output_dir)
    for task in reversed(range(num_tasks)):
        prepare_task(others[1], task)
    finalize(others[1])
    assert hashes(others[1].output_dir) == hashes(recipe.output_dir)


def test_preparing_again_changes_no_file(recipe):
    prepare(recipe)
    before = {file: file.stat().st_mtime_ns for file in recipe.output_dir.rglob("*")}
    prepare(recipe)
    assert {file: file.stat().st_mtime_ns for file in recipe.output_dir.rglob("*")} == before


def test_shards_are_taken_where_their_tokenizer_was_not_copied_with_them(recipe, base_tokenizer, tmp_path):
    shutil.copytree(base_tokenizer, tmp_path / "base")
    recipe = dataclasses.replace(recipe, tokenizer=TokenizerSection(path=str(tmp_path / "base")))
    index = prepare(recipe)
    shutil.rmtree(tmp_path / "base")
    assert prepare(recipe) == index


def test_the_same_conversation_is_on_one_side_of_the_split(recipe, chats_file):
    rows = [json.loads(line) for line in chats_file.read_text().splitlines()]
    turned = [{"conversations": row["messages"]} for row in rows]
    write_rows(chats_file.with_name("again.jsonl"), turned)
    paths = [str(chats_file), str(chats_file.with_name("again.jsonl"))]
    indices = [
        prepare(
            dataclasses.replace(
                recipe,
                output_dir=recipe.output_dir / str(number),
                corpus=dataclasses.replace(recipe.corpus, paths=[path], validation_fraction=0.5),
            )
        )
        for number, path in enumerate(paths)
    ]
    assert indices[0].splits == indices[1].splits


def test_a_tokenizer_is_trained_on_what_is_said_in_training_conversations(recipe, chats_file, tmp_path):
    tokenizer = TokenizerSection(path=str(tmp_path / "trained"), vocab_size=270)
    recipe = dataclasses.replace(recipe, tokenizer=tokenizer)
    assert prepare(recipe).vocab_size == 272
    before = (tmp_path / "trained" / "tokenizer.json").read_bytes()
    assert "messages" not in before.decode()
    reading = open_corpus(recipe.corpus, print, as_chat=True)
    held_out = [chat.messages for chat in read_chats(reading, recipe.corpus, dropped=Counter()) if chat.is_validation]
    rows = [json.loads(line) for line in chats_file.read_text().splitlines()]
    write_rows(chats_file, [*rows, *({"messages": chat} for chat in held_out * 50)])
    shutil.rmtree(tmp_path / "trained")
    prepare_tokenizer(recipe.tokenizer, recipe.corpus, as_chat=True)
    assert (tmp_path / "trained" / "tokenizer.json").read_bytes() == before


def test_a_template_that_says_something_else_is_another_recipe_and_one_that_lies_elsewhere_is_not(recipe, tmp_path):
    index = prepare(recipe)
    assert index.recipe["chat"]["template"] == CHATML.read_text()
    template = tmp_path / "moved.jinja"
    template.write_text(CHATML.read_text())
    assert prepare(with_chat(recipe, template=template)) == index
    template.write_text(CHATML.read_text().replace("+ '\\n' -", "+ '\\n\\n' -"))
    complaint = (
        r"another recipe \(chat.template a text of sha256 \w{12} -> a text of sha256 \w{12}\); set another outp"
    )
    with pytest.raises(UserError, match=complaint):
        prepare(with_chat(recipe, template=template))
    with pytest.raises(UserError, match=r"another recipe \(chat.learn assistant -> all, chat.max_length null -> 9\)"):
        prepare(with_chat(recipe, learn="all", max_length=9))


def test_conversations_and_documents_are_not_taken_for_each_other(recipe, chats_file, base_tokenizer):
    plain = ChatSection(template=ROOT / "tokenization" / "plain.jinja")
    as_chat = dataclasses.replace(recipe, chat=plain)
    write_rows(chats_file, [{"text": f"text {number}"} for number in range(30)])
    prepare(as_chat)
    with pytest.raises(UserError, match=r"another recipe \(chat true -> null\); set another output_dir"):
        prepare(dataclasses.replace(recipe, chat=None))
    documents_dir = recipe.output_dir / "documents"
    as_text = dataclasses.replace(recipe, chat=None, output_dir=documents_dir)
    index = prepare(as_text)
    assert "chat" not in index.recipe
    assert all(shard.targets is None for shard in index.open_split("train"))
    with pytest.raises(UserError, match=r"another recipe \(chat null -> true\); set another output_dir"):
        prepare(dataclasses.replace(as_chat, output_dir=documents_dir))


@pytest.mark.trial
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_preparation_that_is_killed_is_finished_to_the_same_bytes(recipe, chats_file, tmp_path, num_workers):
    rows = chats_file.read_text() * 200
    chats_file.write_text(rows)
    recipe = dataclasses.replace(recipe, num_tasks=4, num_workers=num_workers, tokens_per_shard=20_000)
    prepare(recipe)
    expected = hashes(recipe.output_dir)
    kills = 0
    for number, wait in enumerate((1, 3, 5)):
        killed = dataclasses.replace(recipe, output_dir=tmp_path / f"killed {number}")
        kills += start_and_kill(killed, wait)
        prepare(killed)
        assert hashes(killed.output_dir) == expected
    assert kills > 1


def start_and_kill(recipe: PreparationRecipe, num_shards: int) -> bool:
    """Runs a preparation in a process of its own and kills it when it has written so many shards."""
    code = f"""
from pathlib import PosixPath
from gpt2x.config import ChatSection, CorpusSection, PreparationRecipe, TokenizerSection
from gpt2x.preparation.prepare import prepare
if __name__ == "__main__":
    prepare({recipe!r})
"""
    script = recipe.output_dir.with_suffix(".py")
    script.write_text(code)
    child = subprocess.Popen([sys.executable, str(script)])
    while len(list(recipe.output_dir.rglob("tokens_part_*.safetensors"))) < num_shards and child.poll() is None:
        time.sleep(0.005)
    if child.poll() is not None:
        return False
    family = psutil.Process(child.pid).children(recursive=True)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not psutil.wait_procs(family, timeout=60)[1]
    assert not (recipe.output_dir / "index.json").exists()
    return True
