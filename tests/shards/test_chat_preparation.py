"""Conversations become shards that say what of them is learned, the same bytes however that came about."""

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from gpt2x.config import ChatSection, CorpusSection, DataSection, PreparationRecipe, TokenizerSection
from gpt2x.errors import UserError
from gpt2x.shards.chat_preview import preview
from gpt2x.shards.chats import read_chats
from gpt2x.shards.corpus import open_corpus
from gpt2x.shards.files import open_shard, write_shard
from gpt2x.shards.index import SPLITS, load_index
from gpt2x.shards.preparation import finalize, prepare, prepare_task, prepare_tokenizer
from gpt2x.shards.statistics import statistics
from gpt2x.shards.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
CHATML = ROOT / "tokenization" / "chatml.jinja"
TOKENS = ["<|im_start|>", "<|im_end|>"]
SECTION = ChatSection(template=CHATML, special_tokens=TOKENS, end_of_turn="<|im_end|>")
WORDS = ["alpha", "beta", "gamma", "naïve", "中文", "what?", "Yes."]
NUM_CHATS = 40


def conversation(*texts: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def base_tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / "tokenizer"
    section = TokenizerSection(path=str(path), vocab_size=280)
    save_tokenizer(train_tokenizer([" ".join(WORDS * 9) + "\nuser\nassistant\n"], section), path)
    return path


@pytest.fixture
def chats_file(tmp_path: Path) -> Path:
    """Forty conversations of two to six turns."""
    generator, file = random.Random(0), tmp_path / "chats.jsonl"
    chats = [
        conversation(*(" ".join(generator.choices(WORDS, k=generator.randrange(1, 12))) for _ in range(turns)))
        for turns in generator.choices((2, 4, 6), k=NUM_CHATS)
    ]
    write_rows(file, [{"messages": chat} for chat in chats])
    return file


@pytest.fixture
def recipe(chats_file: Path, base_tokenizer: Path, tmp_path: Path) -> PreparationRecipe:
    """Writes shards of 1000 tokens, several for train."""
    return PreparationRecipe(
        output_dir=tmp_path / "shards",
        corpus=CorpusSection(kind="files", paths=[str(chats_file)], validation_fraction=0.2),
        tokenizer=TokenizerSection(path=str(base_tokenizer)),
        chat=SECTION,
        tokens_per_shard=1000,
        num_workers=1,
    )


def with_chat(recipe: PreparationRecipe, **fields) -> PreparationRecipe:
    assert recipe.chat is not None
    return dataclasses.replace(recipe, chat=dataclasses.replace(recipe.chat, **fields))


def documents(index, split: str) -> list[tuple[list[int], list[int]]]:
    """The ids and the targets of a split's documents."""
    return [
        (shard.tokens[start:end].tolist(), shard.targets[start:end].tolist())
        for shard in index.open_split(split)
        for start, end in pairwise(shard.documents)
    ]


def hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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
    assert other.fingerprint == index.fingerprint


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


@pytest.mark.parametrize("num_tasks", [2, 5])
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
    assert indices[0].fingerprint == indices[1].fingerprint


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
    (tmp_path / "trained" / "tokenizer.json").unlink()
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
    with pytest.raises(
        UserError, match=r"another recipe \(chat.learn 'assistant' -> 'all', chat.max_length None -> 9\)"
    ):
        prepare(with_chat(recipe, learn="all", max_length=9))


def test_conversations_and_documents_are_not_taken_for_each_other(recipe, chats_file, base_tokenizer):
    plain = ChatSection(template=ROOT / "tokenization" / "plain.jinja")
    as_chat = dataclasses.replace(recipe, chat=plain)
    write_rows(chats_file, [{"text": f"text {number}"} for number in range(30)])
    prepare(as_chat)
    with pytest.raises(UserError, match=r"another recipe \(chat True -> None\); set another output_dir"):
        prepare(dataclasses.replace(recipe, chat=None))
    documents_dir = recipe.output_dir / "documents"
    as_text = dataclasses.replace(recipe, chat=None, output_dir=documents_dir)
    index = prepare(as_text)
    assert "chat" not in index.recipe
    assert all(shard.targets is None for shard in index.open_split("train"))
    with pytest.raises(UserError, match=r"another recipe \(chat None -> True\); set another output_dir"):
        prepare(dataclasses.replace(as_chat, output_dir=documents_dir))


def test_a_shard_of_documents_is_byte_for_byte_what_it_was_before_there_were_targets(tmp_path):
    sha256 = write_shard(
        tmp_path / "shard",
        tokens=np.arange(1000, dtype=np.uint16),
        documents=np.array([0, 4, 1000]),
        metadata={"vocab_size": "1000", "eos_token_id": "0", "format": "gpt2x.tokens.1"},
    )
    assert sha256 == "9778f3b4ea9719807d66fdee4b2f10c4fccdd9b4cb51826b5ca2eee9c729157b"


def test_the_safetensors_library_reads_the_targets_and_what_it_writes_is_read(tmp_path):
    arrays = {
        "tokens": np.arange(9, dtype=np.uint16),
        "documents": np.array([0, 4, 9]),
        "targets": (np.arange(9) % 2).astype(np.uint8),
    }
    write_shard(tmp_path / "ours", metadata={}, **arrays)
    save_file(arrays, tmp_path / "theirs", metadata={"a": "b"})
    assert {name: array.tolist() for name, array in load_file(tmp_path / "ours").items()} == {
        name: array.tolist() for name, array in arrays.items()
    }
    for name in ("ours", "theirs"):
        assert open_shard(tmp_path / name).targets.tolist() == [0, 1] * 4 + [0]


@pytest.mark.parametrize("targets", [np.zeros(8, np.uint8), np.zeros(9, np.uint16)])
def test_targets_that_are_not_one_byte_for_each_token_are_refused(tmp_path, targets):
    arrays = {"tokens": np.arange(9, dtype=np.uint16), "documents": np.array([0, 4, 9]), "targets": targets}
    save_file(arrays, tmp_path / "shard")
    with pytest.raises(UserError, match=r"shard: targets must be U8, one for each of the 9 tokens; delete"):
        open_shard(tmp_path / "shard")


def test_a_flipped_target_is_noticed(recipe):
    index = prepare(recipe)
    file = index.directory / "train" / index.splits["train"][0].file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"00000.safetensors: its content has changed"):
        load_index(index.directory).open_split("train")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (
            {"corpus": CorpusSection()},
            r"corpus.kind \(python_stdlib\) has no conversations; with chat set it to files",
        ),
        (
            {"corpus": CorpusSection(kind="files", paths=["a.jsonl", "b.txt.gz"])},
            r"corpus.paths \(b.txt.gz\) has no columns, and chat reads conversations from columns; give .jsonl",
        ),
        (
            {"corpus": CorpusSection(kind="files", paths=["a.jsonl"], text_column="chat")},
            r"corpus.text_column \(chat\) has no effect with chat, which knows the columns of conversations by",
        ),
        (
            {"output_dir": Path("x"), "tokenizer": TokenizerSection(path="x/tokenizer")},
            r"tokenizer.path \(x/tokenizer\) must not be where the shards' own is saved, as chat changes it; set",
        ),
    ],
)
def test_a_recipe_that_cannot_hold_conversations_is_refused(recipe, fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(recipe, **fields)


def test_conversations_longer_than_a_sequence_are_refused_where_documents_stay_whole(recipe):
    recipe = with_chat(recipe, max_length=2048)
    complaint = r"chat.max_length \(2048\) must not exceed data.sequence_length \(1024\) with packing whole_documents"
    with pytest.raises(ValueError, match=complaint):
        DataSection(preparation=recipe, packing="whole_documents")
    DataSection(preparation=recipe, packing="documents")
    DataSection(preparation=recipe, packing="whole_documents", sequence_length=2048)


def test_the_statistics_count_conversations_and_what_is_learned(recipe, chats_file):
    with chats_file.open("a") as file:
        file.write(json.dumps({"messages": []}) + "\n")
    index = prepare(with_chat(recipe, drop_unlearned=True))
    first, _, last = statistics(index).split("\n")
    longest = max(len(ids) for ids, _ in documents(index, "train"))
    tokens, learned = index.total("train", "num_tokens"), index.num_bytes("train")
    number = index.total("train", "num_documents")
    assert first == (
        f"train: {number} conversations, {tokens:,} tokens in {len(index.splits['train'])} shards, {learned:,} bytes "
        f"to learn, the longest conversation {longest} tokens"
    )
    assert last == "left out: 1 without anything to learn"


def single(recipe: PreparationRecipe, *texts: str, copies: int = 3) -> PreparationRecipe:
    """A corpus of one conversation, several times."""
    write_rows(Path(recipe.corpus.paths[0]), [{"messages": conversation(*texts)}] * copies)
    return dataclasses.replace(recipe, corpus=dataclasses.replace(recipe.corpus, validation_fraction=0))


def test_the_preview_shows_a_conversation_with_what_is_learned_in_brackets(recipe):
    index = prepare(single(recipe, "What?", "Yes, 中文.", "And\x1b[2J?", "No."))
    tokenizer = load_tokenizer(index.tokenizer_dir)
    (ids, targets), *_ = documents(index, "train")
    learned, total = 3 * sum(targets), 3 * len(ids)
    assert preview(index, tokenizer) == (
        "the first training document; what is learned stands between ⟦ and ⟧:\n"
        "<|im_start|>user\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes, 中文.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd\ufffd[2J?<|im_end|>\n"
        "<|im_start|>assistant\n⟦No.<|im_end|>⟧\n"
        f"learned: {learned} of {total} tokens ({learned / total:.1%}), in 3 documents; "
        f"the longest has {len(ids)} tokens"
    )


def test_the_preview_of_a_long_conversation_says_how_much_is_not_shown(recipe):
    index = prepare(single(recipe, "What?", "alpha " * 1000))
    (ids, _), *_ = documents(index, "train")
    shown = preview(index, load_tokenizer(index.tokenizer_dir))
    assert f"⟧ ... and {len(ids) - 600:,} tokens more\nlearned: " in shown


def test_the_first_token_of_a_document_does_not_count_as_learned(recipe):
    recipe = single(recipe, "What?", "Yes.")
    for chat in (dataclasses.replace(SECTION, learn="all"), None):
        corpus = dataclasses.replace(recipe.corpus, text_column="text" if chat else "messages")
        again = dataclasses.replace(recipe, chat=chat, corpus=corpus, output_dir=recipe.output_dir / str(bool(chat)))
        index = prepare(again)
        total = index.total("train", "num_tokens")
        assert f"learned: {total - 3} of {total} tokens" in preview(index, load_tokenizer(index.tokenizer_dir))


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
from gpt2x.shards.preparation import prepare
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
