"""The shards of conversations: their format, what is refused about them, and what is told of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from chat_corpora import SECTION, documents, single, with_chat
from safetensors.numpy import load_file, save_file

from gpt2x.config import CorpusSection, DataSection, PreparationRecipe, TokenizerSection
from gpt2x.errors import UserError
from gpt2x.preparation.prepare import prepare
from gpt2x.shards.files import open_shard, write_shard
from gpt2x.shards.index import SPLITS, load_index
from gpt2x.shards.statistics import longest_document, preview, statistics
from gpt2x.tokenizers.bpe import load_tokenizer


@pytest.fixture
def recipe(chat_recipe: PreparationRecipe) -> PreparationRecipe:
    return chat_recipe


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
    assert longest_document(index) == max(len(ids) for split in SPLITS for ids, _ in documents(index, split))
    assert last == "left out: 1 without anything to learn"


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
