"""Of several sources' tokenizers the one with the chat template goes with the model."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gpt2x.batches.mixture import open_mixture
from gpt2x.config import DataSection, SourceSection
from gpt2x.errors import UserError
from gpt2x.shards.index import write_index
from gpt2x.tokenizers.bpe import write_tokenizer

PLAIN, OTHER = "{{ messages[0].content }}", "{{ messages[0].role }}"


@pytest.fixture
def opened(make_index):
    """The mixture of sources whose tokenizers have these templates, by their names."""

    def open_sources(**templates):
        sections = []
        for name, template in templates.items():
            index = make_index([[40]], [[20]], name=name)
            write_index(index)
            backend = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
            tokenizer.chat_template = template
            write_tokenizer(tokenizer, index.directory / "tokenizer")
            sections.append(SourceSection(name=name, path=index.directory))
        return open_mixture(DataSection(sources=sections, sequence_length=8), seed=0)

    return open_sources


@pytest.mark.parametrize("templates", [{"corpus": None, "chats": PLAIN, "more": PLAIN}, {"chats": PLAIN, "b": None}])
def test_the_tokenizer_is_the_first_that_has_a_chat_template(opened, tmp_path, templates):
    assert opened(**templates).tokenizer_dir == tmp_path / "chats" / "tokenizer"


def test_without_a_template_it_is_the_first(opened, tmp_path):
    assert opened(a=None, b=None).tokenizer_dir == tmp_path / "a" / "tokenizer"


def test_a_template_in_the_settings_counts_as_one(opened, tmp_path):
    opened(a=None, b=None)
    (tmp_path / "b" / "tokenizer" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    sources = [SourceSection(name=name, path=tmp_path / name) for name in "ab"]
    found = open_mixture(DataSection(sources=sources, sequence_length=8), seed=0)
    assert found.tokenizer_dir == tmp_path / "b" / "tokenizer"


def test_two_chat_templates_are_refused_by_the_names_of_their_sources(opened):
    message = r"^source 'c' \(.*/c\) has another chat template than 'b' \(.*/b\); prepare one of them again with"
    with pytest.raises(UserError, match=message):
        opened(a=None, b=PLAIN, c=OTHER)


def test_of_one_source_no_tokenizer_is_looked_at(opened, tmp_path):
    opened(a=None)
    (tmp_path / "a" / "tokenizer" / "tokenizer_config.json").write_text("no JSON")
    sources = [SourceSection(name="a", path=tmp_path / "a")]
    found = open_mixture(DataSection(sources=sources, sequence_length=8), seed=0)
    assert found.tokenizer_dir == tmp_path / "a" / "tokenizer"
