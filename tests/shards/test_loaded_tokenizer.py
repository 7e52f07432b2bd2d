"""A loaded tokenizer gives the ids of its own files, and so does what is saved of it."""

import json
import os
import re

import pytest
from disagreeing_tokenizers import EOS, MAKERS, texts, trained, written
from published_data import needed
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, GPT2Tokenizer

from gpt2x.errors import UserError
from gpt2x.tokenizers.bpe import load_tokenizer, text_encoder, tokenizer_fingerprint, write_tokenizer

TEXTS = texts()


def ids_of(backend: Tokenizer) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch(TEXTS)]


@pytest.mark.parametrize("name", MAKERS)
def test_the_ids_are_those_of_the_tokenizers_own_file_whatever_its_class_makes_of_it(name, tmp_path):
    stated = written(name, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded(TEXTS)["input_ids"] == ids_of(stated)
    assert [encoding.ids for encoding in text_encoder(loaded).encode_batch(TEXTS)] == ids_of(stated)
    assert loaded.chat_template == "{{ messages }}"
    by_class = AutoTokenizer.from_pretrained(tmp_path)(TEXTS)["input_ids"]
    assert (by_class == ids_of(stated)) is (name == "same"), "the class was to disagree"


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3", "nanochat"])
def test_what_is_saved_gives_the_same_ids_in_stock_transformers(name, model_type, tmp_path):
    stated = written(name, tmp_path / "published")
    loaded = load_tokenizer(tmp_path / "published")
    write_tokenizer(loaded, tmp_path / "model")
    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "model")
    stock = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert stock(TEXTS)["input_ids"] == ids_of(stated)
    assert (stock.eos_token_id, stock.chat_template) == (loaded.eos_token_id, "{{ messages }}")
    again = load_tokenizer(tmp_path / "model")
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(loaded)


def test_gguf_is_told_how_the_file_cuts_text_and_not_how_the_class_does(tmp_path):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    from gpt2x.publishing.gguf_tokenizer import pre_tokenizer_name

    written("digits", tmp_path)
    assert pre_tokenizer_name(json.loads(load_tokenizer(tmp_path).backend_tokenizer.to_str())) == "smollm"


def test_a_class_that_makes_something_else_of_any_file_is_refused_by_its_name(tmp_path, monkeypatch):
    written("digits", tmp_path)
    monkeypatch.setattr("gpt2x.tokenizers.loading.PreTrainedTokenizerFast", GPT2Tokenizer)
    message = (
        r"its tokenizer_class \(GPT2Tokenizer\) gives other ids than its tokenizer.json, .* another pre_tokenizer"
    )
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_an_end_of_text_that_is_not_in_the_vocabulary_is_refused_by_its_name(tmp_path):
    written("same", tmp_path, eos_token="<end>")
    message = "eos_token '<end>' is not in the vocabulary and would get the new id 400; name a token of the vocabulary"
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_an_added_token_beyond_the_vocabulary_is_refused_where_it_would_be_renumbered(tmp_path):
    written("same", tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 1000, "content": "<far>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"'<far>' has the id 1000 in the files and would get 400; correct tokenizer.json"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("number", "is_right"), [(400, True), (700, False)])
def test_a_token_that_only_the_settings_list_has_the_id_that_they_say_or_is_refused(number, is_right, tmp_path):
    token = {"content": "<end>", "special": True, "lstrip": False, "rstrip": False, "single_word": False}
    written("same", tmp_path, eos_token="<end>", added_tokens_decoder={str(number): token | {"normalized": False}})
    if is_right:
        assert load_tokenizer(tmp_path).eos_token_id == 400
    else:
        with pytest.raises(UserError, match="eos_token '<end>' has the id 700 in the files and would get 400"):
            load_tokenizer(tmp_path)


def test_openais_two_files_alone_are_a_tokenizer(tmp_path):
    backend = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.model.save(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    assert loaded(TEXTS)["input_ids"] == ids_of(backend)
    assert loaded.eos_token == EOS


def test_openais_own_tokenizer_is_loaded_as_ever():
    """Its fingerprint is in the shards that were made with it."""
    directory = needed("gpt2-tokenizer")
    assert tokenizer_fingerprint(load_tokenizer(directory)) == tokenizer_fingerprint(
        AutoTokenizer.from_pretrained(directory)
    )


def test_a_file_without_settings_has_no_end_of_text(tmp_path):
    written("same", tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"has no end-of-text token; set eos_token in its tokenizer_config.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{", "is no JSON"), ("[]", "is not as"), ('{"model": {"type": "BPE"}}', "is no tokenizer")],
)
def test_a_damaged_file_is_refused_in_one_line(content, complaint, tmp_path):
    written("same", tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "tokenizer.json")) + f".*{complaint}") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="is no regular file; restore it, or give another tokenizer"):
        load_tokenizer(tmp_path)


def test_words_are_no_byte_level_and_load_as_well(tmp_path):
    Tokenizer(models.WordLevel({"a": 0, EOS: 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert load_tokenizer(tmp_path).get_vocab() == {"a": 0, EOS: 1}
