"""What the tasks of a preparation have finished, on disk."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from gpt2x.addresses import without_secrets
from gpt2x.config import CorpusSection, PreparationRecipe
from gpt2x.errors import UserError
from gpt2x.shards.chat_template import chat_tokenizer
from gpt2x.shards.files import write_durably
from gpt2x.shards.index import INDEX_FILE, Index, load_index
from gpt2x.shards.tokenizer import tokenizer_fingerprint, vocabulary_size


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe and its tokenizer, and what both come to."""

    recipe: PreparationRecipe
    tokenizer: PreTrainedTokenizerFast
    vocab_size: int
    """Every id is below it."""
    made_of: dict[str, Any]
    """What determines the shards, as JSON gives it back."""

    @property
    def output_dir(self) -> Path:
        """Where the shards go."""
        return self.recipe.output_dir

    @property
    def fingerprint(self) -> str:
        """The tokenizer's."""
        return self.made_of["tokenizer_fingerprint"]


def plan_of(recipe: PreparationRecipe, tokenizer: PreTrainedTokenizerFast) -> Plan:
    """Works out the fingerprint, which takes a fifth of a second for a large vocabulary, once.

    Raises:
        UserError: where the recipe's chat section does not fit the tokenizer.
    """
    if recipe.chat is not None:
        tokenizer = chat_tokenizer(tokenizer, recipe.chat)
    made_of = {
        **without_secrets(dataclasses.asdict(recipe.corpus)),
        "tokens_per_shard": recipe.tokens_per_shard,
        "num_tasks": recipe.num_tasks,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }
    if recipe.chat is not None:
        # What the template says, not where it lies.
        made_of["chat"] = {**dataclasses.asdict(recipe.chat), "template": tokenizer.chat_template}
    return Plan(recipe=recipe, tokenizer=tokenizer, vocab_size=vocabulary_size(tokenizer), made_of=made_of)


def finished_index(plan: Plan) -> Index | None:
    """The finished data in output_dir, if there is any; it must be this recipe's.

    Data cut into another number of tasks are the same documents and count.

    Raises:
        UserError: with what has changed.
    """
    if not (plan.output_dir / INDEX_FILE).is_file():
        return None
    index = load_index(plan.output_dir)
    # An index does not list the fields that came after it; they had no effect.
    found = {**dataclasses.asdict(CorpusSection()), **_flat(without_secrets(index.recipe))}
    wanted = _flat(plan.made_of)
    has_chat = found.get("chat") == wanted.get("chat")
    keys = [key for key in wanted | found if (has_chat or not key.startswith("chat.")) and key in {*wanted, "chat"}]
    changed = [f"{k} {_shown(found.get(k))} -> {_shown(wanted.get(k))}" for k in keys if found.get(k) != wanted.get(k)]
    if changed:
        raise UserError(
            f"'{plan.output_dir}' holds data of another recipe ({', '.join(changed)}); set another output_dir, or "
            f"delete that directory."
        )
    return index


def _flat(made_of: Mapping[str, Any]) -> dict[str, Any]:
    """Without the number of tasks, and with the fields of chat beside the others."""
    flat = {key: value for key, value in made_of.items() if key not in ("num_tasks", "chat")}
    chat = made_of.get("chat")
    return flat if chat is None else {**flat, "chat": True, **{f"chat.{key}": value for key, value in chat.items()}}


def _shown(value: Any) -> str:
    """A value for a message of one line; a template by its hash."""
    if isinstance(value, str) and "\n" in value:
        return f"a text of sha256 {hashlib.sha256(value.encode()).hexdigest()[:12]}"
    return repr(value)


def tasks_dir(output_dir: Path) -> Path:
    """Where the records are until the index is written."""
    return output_dir / "tasks"


def _record_file(output_dir: Path, task: int) -> Path:
    return tasks_dir(output_dir) / f"task_{task:05d}.json"


def recorded(plan: Plan, task: int) -> dict[str, Any] | None:
    """What a finished task made, or None where it is not finished or was another preparation's."""
    file = _record_file(plan.output_dir, task)
    record = json.loads(file.read_bytes()) if file.is_file() else {}
    return record if record.get("made_of") == plan.made_of else None


def write_record(plan: Plan, task: int, record: dict[str, Any]) -> None:
    """Records a finished task, whose shards are on the disk."""
    content = json.dumps({"made_of": plan.made_of, **record})
    write_durably(_record_file(plan.output_dir, task), [content.encode()])


def forget_other_preparations(plan: Plan) -> None:
    """A preparation that was changed half-way must not be finished with the shards of before.

    Raises:
        UserError: where it was the tokenizer that changed, which nobody asks for and every part would be lost by.
    """
    tasks_dir(plan.output_dir).mkdir(parents=True, exist_ok=True)
    for file in sorted(tasks_dir(plan.output_dir).glob("task_*.json")):
        try:
            found = json.loads(file.read_bytes())["made_of"]
        except FileNotFoundError:  # another task has just forgotten it
            continue
        before, now = found["tokenizer_fingerprint"], plan.fingerprint
        if before != now:
            raise UserError(
                f"'{plan.output_dir}' holds parts made with another tokenizer ({before[:8]}, now {now[:8]}); restore "
                f"the tokenizer, or delete that directory."
            )
        if found != plan.made_of:
            file.unlink(missing_ok=True)
