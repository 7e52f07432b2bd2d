"""A run's directory: its one writer, and whether to start, to go on, or to refuse."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import SoftFileLease

from gpt2x import files
from gpt2x.checkpoints.format import list_checkpoints, read_trainer
from gpt2x.config import TrainingRecipe, to_yaml
from gpt2x.errors import UserError
from gpt2x.files import DamagedError, append_line, make_directory, read_json, read_yaml, set_aside, sync, write_file
from gpt2x.runs.changes import Changes, as_table, changes_between, changes_of_shape, is_larger_budget
from gpt2x.runs.layout import LOCK_NAMES, RunLayout, named_checkpoints

# Every recipe of a run has these, by which its config.yaml is told from other people's.
_SECTIONS = ("run", "data", "train", "optimizer")
_PASSING = re.compile(rf"({'|'.join(map(re.escape, LOCK_NAMES))}).*|.+\.tmp-[0-9a-f]{{8}}")
_UNKNOWN: Changes = {"recipe": ("unknown", "this one")}


@dataclass(frozen=True, kw_only=True)
class Hold:
    """A run directory that this process has to itself.

    Attributes:
        path: the directory.
        identity: device and number of its inode, by which it is known whatever its name.
        lease: what other machines see of the lock.
    """

    path: Path
    identity: tuple[int, int]
    lease: SoftFileLease

    def check(self) -> None:
        """Raises UserError where the directory is no longer there, or no longer this process's."""
        try:
            is_there = _identity(self.path) == self.identity
        except OSError:
            is_there = False
        if not is_there:
            raise UserError(
                f"{self.path} was moved or removed while the run was writing to it, and nothing is made anew there; "
                f"bring it back, or set run.dir and run.name to where it is, and the same command goes on."
            )
        if self.lease.compromise is not None:
            raise UserError(
                f"{self.path} was taken over by another process, since this one gave no sign of life for "
                f"{files.LEASE_S:.0f} s; see that only one of them runs."
            )


@dataclass(frozen=True)
class RunDirectory(RunLayout):
    """The files of one run, and what this process may do there.

    Attributes:
        path: ``runs/NAME``.
        changes: fields of the recipe that differ from those it was run with before, as (old, new).
        notes: lines to be said of what is not as it was left.
        hold: by which this process has it to itself; None where it only looks.
    """

    changes: Changes = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hold: Hold | None = None

    def is_finished(self) -> bool:
        """Whether the budget of the recipe that it was opened with was spent here; a larger one is not."""
        try:
            return not self.changes and read_json(self.stats_file, dict[str, Any]) is not None
        except DamagedError:
            return False

    def check(self) -> None:
        """Raises UserError where this process must not write here any more."""
        if self.hold is not None:
            self.hold.check()

    def append(self, file: Path, record: Mapping[str, Any]) -> None:
        """Appends one JSON object as a line to one of the record_files.

        Raises:
            UserError: where it cannot be written, or this process must not write here any more.
        """
        self.check()
        append_line(file, json.dumps(record, ensure_ascii=False, allow_nan=False).encode())

    def sync_records(self) -> None:
        """Waits until what was recorded so far is on the disk."""
        for file in self.record_files:
            if file.exists():
                sync(file)
        sync(self.path)


@contextmanager
def locked(run_dir: Path) -> Iterator[Hold]:
    """Has a run directory to itself while the block runs.

    Args:
        run_dir: made where it is missing.

    Raises:
        UserError: where another process has it, and where the directory cannot be written to.
    """
    with ExitStack() as stack:
        try:
            files.make_directory(run_dir)
            lease = stack.enter_context(files.locked(run_dir / LOCK_NAMES[0]))
            hold = Hold(path=run_dir, identity=_identity(run_dir), lease=lease)
        except files.BusyError as error:
            raise UserError(
                f"{run_dir} is being written by {error}; wait for it, or start another run with --run.name NAME."
            ) from error
        except files.UnwritableError as error:
            raise UserError(
                f"{run_dir} cannot be written to ({error.reason}); make it writable, or set run.dir."
            ) from error
        yield hold


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def open_run_directory(recipe: TrainingRecipe, *, name: str) -> RunDirectory:
    """The directory of a run, new or to be gone on with; nothing is changed there.

    Args:
        recipe: what is to be run.
        name: the run's name where the recipe gives none.

    Raises:
        UserError: where something else than a run lies there; where another recipe has run there, with the
            differences; where they cannot be gone on with.
    """
    name = name if recipe.run.name is None else recipe.run.name
    if name in ("", ".", ".."):
        raise UserError(f"the recipe's file name ({name!r}) is no name of a run; give one by --run.name NAME.")
    run = RunDirectory(recipe.run.dir / name)
    contents = _contents(run.path)
    if not contents:
        return run
    recorded, notes = _recorded_recipe(run)
    checkpoints = named_checkpoints(run.path)
    if recorded is None and not checkpoints:
        raise UserError(
            f"{run.path} is no run: it holds {', '.join(contents[:5])}{' ...' if contents[5:] else ''}, which stays "
            f"as it is; start another run with --run.name NAME, or set run.dir."
        )
    if not checkpoints and not _holds_records(run) and not os.path.lexists(run.stats_file):
        return run  # stopped before its first step: there is nothing to go on with
    changes = _UNKNOWN if recorded is None else changes_between(recorded, recipe)
    _check_changes(run, changes, recipe, notes)
    return replace(run, changes=changes, notes=tuple(notes))


def _contents(directory: Path) -> list[str]:
    """The names of what lies in a directory, but for what locks and killed writers leave."""
    try:
        return sorted(name for name in os.listdir(directory) if not _PASSING.fullmatch(name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written to ({error.strerror}); make it writable, or set run.dir."
        ) from error


def _recorded_recipe(run: RunDirectory) -> tuple[dict[str, Any] | None, list[str]]:
    """The recipe that ran here as plain data, and a line where it is not taken from config.yaml."""
    try:
        recipe = read_yaml(run.config_file)
        if all(isinstance(recipe.get(section), dict) for section in _SECTIONS):
            return recipe, []
        problem = f"{run.config_file} is no recipe of a run"
    except DamagedError as error:
        problem = str(error)
    for checkpoint in reversed(list_checkpoints(run.path)):
        try:
            if recorded := read_trainer(checkpoint).get("recipe"):
                return recorded, [f"{problem}; the recipe is that of {checkpoint}, and is written there again."]
        except DamagedError:
            continue
    return None, [f"{problem}, and no checkpoint tells the recipe that ran there"]


def _check_changes(run: RunDirectory, changes: Changes, recipe: TrainingRecipe, notes: list[str]) -> None:
    if changes is _UNKNOWN and not recipe.resume:
        raise UserError(f"{notes[0]}; if it is this one, go on by --resume, or start a new run with --run.name NAME.")
    if changes and not recipe.resume and not is_larger_budget(changes):
        raise UserError(
            f"{run.path} was run with another recipe; start a new run with --run.name NAME, or go on with this one "
            f"and these changes by --resume.",
            table=as_table(changes),
        )
    if shapes := changes_of_shape(changes):
        raise UserError(
            f"{run.path} cannot go on with another model, which its weights would not fit; set back what is listed "
            f"below, or start a new run with --run.name NAME.",
            table=as_table(shapes),
        )


def _holds_records(run: RunDirectory) -> bool:
    """Whether something was recorded there, a whole line or not."""
    return any(file.lstat().st_size for file in run.record_files if os.path.lexists(file))


def write_config(run: RunDirectory, recipe: TrainingRecipe) -> None:
    """Records the resolved recipe, and makes the place of the checkpoints, which by being there says that none were
    removed. What is no recipe and has the name is set aside."""
    run.check()
    make_directory(run.path)
    try:
        read_yaml(run.config_file)
    except DamagedError:
        if os.path.lexists(run.config_file):
            set_aside(run.config_file)
    write_file(run.config_file, to_yaml(recipe).encode())
    make_directory(run.checkpoints_dir)
