"""Conversations from what sources say of themselves."""

import json.decoder
from pathlib import Path

import pytest

from gpt2x.corpus.docstrings import conversations

SOURCE = '''
"""A module."""
raise SystemExit("nobody may run this")

def area(width, height):
    """The area
    of a rectangle.

    More about it.
    """

def undocumented(): ...

def _private():
    """Hidden."""

class Shape:
    """Something flat."""

    def turn(self):
        """Turns it."""

    def silent(self): ...

    async def draw(self):
        """Draws it."""
'''


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "flat.py"
    file.write_text(SOURCE)
    return file


def test_a_function_is_one_question_and_a_class_goes_on_with_its_methods(source):
    assert [tuple(found) for found in conversations(source, "flat")] == [
        ("flat.area", turns("What does the function flat.area do?", "The area of a rectangle.")),
        (
            "flat.Shape",
            turns(
                *("What does the class flat.Shape do?", "Something flat."),
                *("And its method turn?", "Turns it."),
                *("And its method draw?", "Draws it."),
            ),
        ),
    ]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"def broken(:\n"], ids=["not UTF-8", "no Python"])
def test_a_file_that_cannot_be_parsed_has_no_conversation(tmp_path, content):
    (tmp_path / "odd.py").write_bytes(content)
    assert list(conversations(tmp_path / "odd.py", "odd")) == []


def test_the_answers_are_those_that_python_itself_gives():
    found = dict(conversations(Path(json.decoder.__file__), "json.decoder"))
    assert found["json.decoder.JSONDecoder"][1]["content"] == json.decoder.JSONDecoder.__doc__.split("\n")[0]
    asked = [message["content"] for message in found["json.decoder.JSONDecoder"] if message["role"] == "user"]
    assert asked[1:] == ["And its method decode?", "And its method raw_decode?"]


def test_a_class_with_many_methods_is_asked_about_the_first(tmp_path):
    methods = "".join(f'    def m{number}(self):\n        """Does {number}."""\n' for number in range(9))
    (tmp_path / "many.py").write_text(f'class Many:\n    """Much."""\n{methods}')
    ((_, messages),) = conversations(tmp_path / "many.py", "many")
    assert [message["content"] for message in messages[3::2]] == ["Does 0.", "Does 1.", "Does 2."]
