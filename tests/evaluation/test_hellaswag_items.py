"""Reading HellaSwag's items, whole or a fixed part, and what is said where they are none."""

import json

import pytest
from hellaswag_text import rows

from gpt2x.errors import UserError
from gpt2x.evaluation.hellaswag_items import item_texts, load_hellaswag


def write(tmp_path, *made):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return file


def test_labels_are_numbers_or_their_spelling(tmp_path):
    made = rows()
    assert {type(row["label"]) for row in made} == {int, str}
    assert [item.label for item in load_hellaswag(write(tmp_path, *made))] == [i % 4 for i in range(20)]


def test_a_part_is_the_items_at_equal_distances(tmp_path):
    file = write(tmp_path, *rows())
    whole, part = load_hellaswag(file), load_hellaswag(file, num_items=6)
    assert part == [whole[i] for i in (0, 3, 6, 10, 13, 16)]
    assert load_hellaswag(file, num_items=20) == whole


def test_the_texts_are_those_of_lm_eval(tmp_path):
    row = rows()[0] | {
        "activity_label": "How to sail",
        "ctx_a": "[header] Leave [title] Hoist.",
        "ctx_b": "the Boat",
        "endings": [" moves [step]  on. "] * 4,
    }
    (item,) = load_hellaswag(write(tmp_path, row))
    # Of three spaces that a tag leaves, two are made one; lm-eval stops there.
    assert item_texts(item, "hellaswag") == ("How to sail: Leave. Hoist. The boat", ["moves  on."] * 4)


def test_the_completion_style_takes_the_text_as_it_stands(tmp_path):
    row = rows()[0] | {"ctx": "[header] Leave", "endings": ["a", "b", "[step] c", "d"]}
    (item,) = load_hellaswag(write(tmp_path, row))
    assert item_texts(item, "hellaswag_completion") == ("[header] Leave", ["a", "b", "[step] c", "d"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"label": ""},
            r"rows.jsonl:1: label \(''\) must be the place of one of the 4 endings, from 0; only the train",
        ),
        ({"label": 4}, r"rows.jsonl:1: label \('4'\) must be the place of one of the 4 endings"),
        ({"endings": ["a", "b", "[step]", "d"]}, "rows.jsonl:1 has an empty ending, which has no probability; leave"),
        ({"endings": ["a", "b", "c"]}, "rows.jsonl:1: endings must be a list of 4 texts; give the columns of Rowan"),
        ({"endings": "abcd"}, "rows.jsonl:1: endings must be a list of 4 texts; give the columns of Rowan"),
        ({"ctx_b": None}, r"rows.jsonl:1: ctx_b \(None\) must be a text; give the columns of Rowan/hellaswag."),
    ],
)
def test_an_item_that_cannot_be_scored_is_named(tmp_path, change, line):
    with pytest.raises(UserError, match=line):
        load_hellaswag(write(tmp_path, rows()[0] | change))


def test_missing_columns_are_named(tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl:1 has no ctx_b, label; give the columns of Rowan/hellaswag."):
        load_hellaswag(write(tmp_path, {"activity_label": "", "ctx_a": "", "endings": []}))


@pytest.mark.parametrize("line", [b"{oops\n", b'{"ctx_a": "\xff"}\n'])
def test_what_is_no_json_is_named_by_its_line(tmp_path, line):
    file = write(tmp_path, rows()[0])
    file.write_bytes(file.read_bytes() + line)
    with pytest.raises(UserError, match=r"rows.jsonl:2 is no JSON; give one JSON object per line."):
        load_hellaswag(file)


def test_more_items_than_there_are_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"num_items \(21\) must not exceed the 20 items of .*rows.jsonl; lower it."):
        load_hellaswag(write(tmp_path, *rows()), num_items=21)


def test_a_file_without_items_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"rows.jsonl has no items; give HellaSwag's validation split as a .jsonl file"
    ):
        load_hellaswag(write(tmp_path))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone.jsonl does not exist; give HellaSwag's validation split as a .jsonl"):
        load_hellaswag(tmp_path / "gone.jsonl")


def test_the_hub_out_of_reach_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=r"Rowan/hellaswag could not be read from the Hub .*; give its validation"):
        load_hellaswag("hub")
