"""What a newcomer gets wrong is told in one line that names value, rule and remedy; docs/mistakes.md has it."""

import re
from pathlib import Path

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
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[Mistake, Told]:
    scratch = tmp_path_factory.mktemp("mistakes")
    lay_out(scratch / "home", environment_of(None, scratch))
    return {mistake: tell(mistake, Path(scratch)) for mistake in every()}


def test_there_are_sixty_mistakes_and_none_stands_twice() -> None:
    assert len({shown(mistake) + mistake.absent for mistake in every()}) == len(list(every())) >= 60


@pytest.mark.parametrize("mistake", every(), ids=shown)
def test_a_mistake_is_told_in_one_line_with_value_and_remedy(mistake: Mistake, told: dict[Mistake, Told]) -> None:
    found = told[mistake]
    *notices, line = found.lines if not mistake.is_table else found.lines[:1]
    assert found.code in (1, 2)
    assert COMPLAINT.match(line)
    assert all(NOTICES.match(notice) for notice in notices)
    said = "\n".join(found.lines)
    assert mistake.value in said
    assert mistake.remedy in said
    assert PYTHON.search(said) is None
    assert "Traceback" not in found.stdout
    assert len(line) <= LONGEST


def test_the_table_of_mistakes_is_what_they_are_told(told: dict[Mistake, Told]) -> None:
    assert TABLE.read_text(encoding="utf-8") == table_of(told), "python tests/trials/mistakes.py writes it anew"
