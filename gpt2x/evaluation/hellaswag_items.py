"""HellaSwag's items (arXiv:1905.07830), and the two ways in which they are put to a language model as text.

Imports neither torch nor transformers: items that are not there are told before.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpt2x.config import EvaluationSection
from gpt2x.errors import UserError

HUB_ID = "Rowan/hellaswag"
NUM_VALIDATION_ITEMS = 10_042
Style = Literal["hellaswag", "hellaswag_completion"]
_TEXTS = ("activity_label", "ctx_a", "ctx_b")
_COLUMNS = (*_TEXTS, "endings", "label")
_NUM_ENDINGS = 4


@dataclass(frozen=True, kw_only=True)
class HellaSwagItem:
    """The beginning of a description and four endings, one of them right."""

    activity_label: str
    """What is being done; in WikiHow's items the article's title."""
    ctx_a: str
    """The beginning's whole sentences."""
    ctx_b: str
    """The start of the sentence that the endings end; empty in WikiHow's items."""
    ctx: str
    """Both, as one text."""
    endings: tuple[str, ...]
    """The four endings."""
    label: int
    """The place of the right one, from 0."""


def load_hellaswag(
    source: str | Path, *, num_items: int | None = None, option: str = "num_items"
) -> list[HellaSwagItem]:
    """Reads HellaSwag's items.

    Args:
        source: a .jsonl file with the columns of the Hub's ``Rowan/hellaswag``, or ``hub`` for its validation split.
        num_items: a fixed subset of that size: items at equal distances, so that both sources (ActivityNet's items
            come first, WikiHow's after) have their share.
        option: the user's name for num_items.

    Raises:
        UserError: where there are no items, or fewer than asked for, and with the place of an item that is none.
    """
    if str(source) == "hub":
        items = [_item(row, f"row {i} of {HUB_ID}") for i, row in enumerate(_hub_rows())]
    else:
        items = [_item(row, place) for row, place in _file_rows(Path(source))]
    if not items:
        raise UserError(f"{source} has no items; give HellaSwag's validation split as a .jsonl file, or hub.")
    if num_items is None:
        return items
    if num_items > len(items):
        raise UserError(f"{option} ({num_items}) must not exceed the {len(items)} items of {source}; lower it.")
    return [items[i * len(items) // num_items] for i in range(num_items)]


def load_run_items(section: EvaluationSection) -> list[HellaSwagItem]:
    """The items that a run is scored on.

    Raises:
        UserError: for whatever is wrong with them.
    """
    return load_hellaswag(
        str(section.hellaswag), num_items=section.hellaswag_items, option="evaluation.hellaswag_items"
    )


def _hub_rows() -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset

    from gpt2x.corpus.dataset_rows import reason_of

    try:
        return load_dataset(HUB_ID, split="validation")
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise UserError(
            f"{HUB_ID} could not be read from the Hub ({reason}); give its validation split as a .jsonl file."
        ) from None


def _file_rows(file: Path) -> Iterator[tuple[Any, str]]:
    if not file.is_file():
        raise UserError(f"{file} does not exist; give HellaSwag's validation split as a .jsonl file, or hub.")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line), f"{file}:{number}"
                except ValueError:
                    raise UserError(f"{file}:{number} is no JSON; give one JSON object per line.") from None


def _item(row: Any, place: str) -> HellaSwagItem:
    missing = [column for column in _COLUMNS if not isinstance(row, dict) or column not in row]
    if missing:
        raise UserError(f"{place} has no {', '.join(missing)}; give the columns of {HUB_ID}.")
    for column in _TEXTS:
        if not isinstance(row[column], str):
            raise UserError(f"{place}: {column} ({row[column]!r}) must be a text; give the columns of {HUB_ID}.")
    endings, label = row["endings"], str(row["label"])
    if not _are_endings(endings):
        raise UserError(f"{place}: endings must be a list of {_NUM_ENDINGS} texts; give the columns of {HUB_ID}.")
    if not all(_without_tags(ending) for ending in endings):
        raise UserError(f"{place} has an empty ending, which has no probability; leave the item out.")
    if label not in [str(number) for number in range(len(endings))]:
        raise UserError(
            f"{place}: label ({label!r}) must be the place of one of the {len(endings)} endings, from 0; only the "
            f"train and validation splits have labels."
        )
    ctx = row.get("ctx") or f"{row['ctx_a']} {row['ctx_b']}".strip()
    return HellaSwagItem(**{key: row[key] for key in _TEXTS}, ctx=ctx, endings=tuple(endings), label=int(label))


def _are_endings(value: Any) -> bool:
    return isinstance(value, list) and len(value) == _NUM_ENDINGS and all(isinstance(text, str) for text in value)


def item_texts(item: HellaSwagItem, style: Style) -> tuple[str, list[str]]:
    """(context, endings) as text; a space joins them.

    ``hellaswag`` is lm-eval's task of that name, version 1: the activity stands in front, the last sentence begins
    with a capital (the rest of it in lower case), and WikiHow's tags are taken out. ``hellaswag_completion`` is that
    of llm.c and build-nanogpt: the text as it stands.
    """
    if style == "hellaswag_completion":
        return item.ctx, list(item.endings)
    context = f"{item.activity_label}: {item.ctx_a} {item.ctx_b.capitalize()}"
    return _without_tags(context), [_without_tags(ending) for ending in item.endings]


def _without_tags(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
