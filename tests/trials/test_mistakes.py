"""What a newcomer gets wrong is told in one line that names value, rule and remedy; docs/mistakes.md has it."""

import re
from collections.abc import Callable
from functools import cache

import pytest
from mistakes import TABLE, Mistake, Told, environment_of, every, shown, table_of, tell
from mistakes_disk import lay_out

pytestmark = pytest.mark.trial

COMPLAINT = re.compile(r"(\w+\.py: )?error: \S")
# What is told of a work before it fails.
NOTICES = re.compile(r"training a tokenizer of |corpus\.paths: files of other kinds are passed over: ")
PYTHON = re.compile(r"<class|typing\.|\bNone\b|NoneType|\bTrue\b|\bFalse\b|\[['\"]|Errno|\w(Error|Exception)\b| at 0x")
LONGEST = 240


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mistake], Told]:
    """What a mistake is told; each is made once."""
    scratch = tmp_path_factory.mktemp("mistakes")
    lay_out(scratch / "home", environment_of(None, scratch))
    return cache(lambda mistake: tell(mistake, scratch))


def test_there_are_sixty_mistakes_and_none_stands_twice() -> None:
    assert len({shown(mistake) + mistake.absent for mistake in every()}) == len(list(every())) >= 60


@pytest.mark.parametrize("mistake", list(every()), ids=shown)
def test_a_mistake_is_told_in_one_line_with_value_and_remedy(
    mistake: Mistake, told: Callable[[Mistake], Told]
) -> None:
    found = told(mistake)
    *notices, line = found.lines[:1] if mistake.is_table else found.lines
    said = "\n".join(found.lines)
    assert found.code in (1, 2)
    assert COMPLAINT.match(line)
    assert all(NOTICES.match(notice) for notice in notices)
    assert mistake.value in said
    assert mistake.remedy in said
    assert PYTHON.search(said) is None
    assert "Traceback" not in found.stdout
    assert len(line) <= LONGEST


def test_the_table_of_mistakes_is_what_they_are_told(told: Callable[[Mistake], Told]) -> None:
    written = table_of({mistake: told(mistake) for mistake in every()})
    assert TABLE.read_text(encoding="utf-8") == written, "python tests/trials/mistakes.py writes it anew"
