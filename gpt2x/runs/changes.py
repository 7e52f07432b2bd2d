"""What differs between the recipe of a run and the one it is to go on with."""

from collections.abc import Mapping
from typing import Any

import yaml

from gpt2x.addresses import without_secrets
from gpt2x.config import BUDGETS, TrainingRecipe, to_yaml
from gpt2x.config.checks import shown

_MOST_ROWS = 10
Changes = Mapping[str, tuple[Any, Any]]

# Fields that say how to start, not what to train: two runs that differ in them alone are the same run.
_NOT_PART_OF_A_RUN = ("resume", "run", "hub")
# Sections without sections inside, in which a field that is missing is one that was not there yet.
_SECTIONS_THAT_GROW = ("train", "optimizer", "evaluation")
# Fields of the model that its weights do not depend on.
_NOT_OF_SHAPE = {"attention_dropout", "hidden_dropout", "embedding_dropout", "initializer_range", "residual_init"}
# Fields of the adapters that theirs do not depend on.
_NOT_OF_ADAPTERS = {"alpha", "dropout", "merge"}


def plain(recipe: TrainingRecipe) -> dict[str, Any]:
    """A recipe as it is recorded: as plain data."""
    content: dict[str, Any] = yaml.safe_load(to_yaml(recipe))
    return content


def changes_between(recorded: Mapping[str, Any], recipe: TrainingRecipe) -> Changes:
    """Fields that differ, as (old, new).

    Args:
        recorded: the recipe that ran, as plain data.
        recipe: what is to be run.
    """
    before, after = _flat(without_secrets(recorded)), _flat(plain(recipe))
    fields = [field for field in before | after if field.split(".")[0] not in _NOT_PART_OF_A_RUN]
    # what the version that recorded the recipe did not have yet
    fields = [field for field in fields if field in before or field.split(".")[0] not in _SECTIONS_THAT_GROW]
    fields = [field for field in fields if not _is_same_template(field, before.get(field), after.get(field))]
    fields += ["run.seed"]
    return {field: (before.get(field), after.get(field)) for field in fields if before.get(field) != after.get(field)}


def _is_same_template(field: str, old: Any, new: Any) -> bool:
    """Older versions recorded a template's path as it was given, not where it lies."""
    return field.endswith("chat.template") and bool(old) and str(new).endswith(f"/{old}")


def as_table(changes: Changes) -> list[str]:
    """The lines of a table: what each changed field was and is, as YAML spells it; of ten at most, and a count."""
    rows = [("field", "was", "is"), *((field, shown(old), shown(new)) for field, (old, new) in changes.items())]
    rows, left_out = rows[: _MOST_ROWS + 1], len(rows) - 1 - _MOST_ROWS
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:2]]
    lines = [f"{field:{widths[0]}}  {old:{widths[1]}}  {new}" for field, old, new in rows]
    return [*lines, f"and {left_out} more"] if left_out > 0 else lines


def is_larger_budget(changes: Changes) -> bool:
    """Whether the run is merely to be longer."""
    budgets = {f"train.{name}" for name in BUDGETS}
    return set(changes) <= budgets and all(
        isinstance(old, int | float) and isinstance(new, int | float) and new > old for old, new in changes.values()
    )


def changes_of_shape(changes: Changes) -> Changes:
    """Those that saved weights do not fit."""
    return {field: change for field, change in changes.items() if _is_of_shape(*field.split(".", 1))}


def _is_of_shape(section: str, field: str = "") -> bool:
    if section == "lora":
        return field not in _NOT_OF_ADAPTERS
    return section == "model" and field not in _NOT_OF_SHAPE


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):  # as data.sources
            leaves |= _flat({f"{key}[{number}]": item for number, item in enumerate(value)}, prefix)
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
