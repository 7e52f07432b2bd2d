"""What a run has left so far, cut back to where it goes on from."""

import os
from pathlib import Path

from typing_extensions import TypedDict

from gpt2x.errors import UserError
from gpt2x.files import DamagedError, parse_json, read_bytes, remove_leftovers, set_aside, sync, tell_once, write_file
from gpt2x.runs.directory import RunDirectory


class Record(TypedDict):
    """A line of a record file."""

    step: int


def truncate_records(run: RunDirectory, *, step: int, is_followed_up: bool) -> None:
    """Drops what was recorded after a step, so that a resumed run writes no step twice.

    Args:
        run: whose records.
        step: the last step that counts.
        is_followed_up: whether its validation and samples count as well, or will be made again.

    Raises:
        UserError: where something else than a file has the name of one.
    """
    for file in run.record_files:
        if (content := _content(file)) is None:
            continue
        records = [(line, _record(line)) for line in content.split(b"\n")]
        num_damaged = sum(record is None and bool(line.strip()) for line, record in records[:-1])
        if num_damaged:
            tell_once(f"{file}: {num_damaged} damaged lines are dropped.")
        kept = b"".join(line + b"\n" for line, record in records if _is_kept(record, step, is_followed_up))
        if kept != content:
            run.check()
            write_file(file, kept)


def recorded_validation(run: RunDirectory, *, step: int) -> float | None:
    """The validation loss that was recorded at a step; None where none was.

    The last one of a budget is made after the checkpoint of its step, which does not know of it.
    """
    lines = (_content(run.metrics_file) or b"").split(b"\n")
    records = [record for line in lines if b'"val/loss"' in line and (record := _record(line)) is not None]
    losses: list[object] = [record.get("val/loss") for record in records if record["step"] == step]
    return next((float(loss) for loss in losses if isinstance(loss, int | float)), None)


def clear(run: RunDirectory) -> None:
    """Removes what a run that never had a checkpoint recorded, so that it starts from nothing."""
    for file in run.record_files:
        if _content(file) is not None:
            run.check()
            file.unlink()


def reopen(run: RunDirectory) -> None:
    """Takes back that a run is finished, which goes on."""
    if not os.path.lexists(run.stats_file):
        return
    run.check()
    if run.stats_file.is_file():
        run.stats_file.unlink()
        sync(run.path)
    else:
        set_aside(run.stats_file)


def sweep(run: RunDirectory) -> None:
    """Removes what killed writers of the run's own files have left under temporary names."""
    run.check()
    for file in (run.config_file, run.final_dir, run.stats_file, run.losses_file, *run.record_files):
        remove_leftovers(run.path, file.name)
    remove_leftovers(run.plots_dir)


def refuse_to_start_over(run: RunDirectory, *, damaged: list[str], damage_of_final: str | None) -> None:
    """Raises UserError where a run without a whole checkpoint has something that a start from nothing would lose.

    Args:
        run: the run.
        damaged: a line for each checkpoint that is damaged.
        damage_of_final: what is wrong with its final model; None where it is whole.
    """
    recorded = [file.name for file in run.record_files if _content(file)]
    lost = [path.name for path in (run.final_dir, run.stats_file) if os.path.lexists(path)]
    were_removed = bool(recorded) and not os.path.lexists(run.checkpoints_dir)
    if not (lost or damaged or were_removed):
        return
    there = ", ".join([*lost, *recorded, *(["damaged checkpoints"] if damaged else [])])
    way_on = "bring its checkpoints back, or start another run with --run.name NEW"
    if damage_of_final is None:
        way_on = f"its model in {run.final_dir} is whole: go on from it by --init_from {run.final_dir} --run.name NEW"
    elif os.path.lexists(run.stats_file):
        way_on = f"its final/ is damaged ({damage_of_final}) and cannot be made again; {way_on}"
    first = f" ({damaged[0].partition(';')[0]})" if damaged else ""
    raise UserError(
        f"{run.path} has no whole checkpoint to go on from{first}, and what it holds ({there}) is not given up for a "
        f"start from step 0; {way_on}."
    )


def _content(file: Path) -> bytes | None:
    """None where there is no such file."""
    if not os.path.lexists(file):
        return None
    try:
        return read_bytes(file, max_bytes=2**62)
    except DamagedError as error:
        raise UserError(f"{error}; it is where the run records: mend that, and the same command goes on.") from error


def _record(line: bytes) -> Record | None:
    """None where a line is no record; a killed run may leave a torn one."""
    try:
        return parse_json(line, Record, where="line")
    except DamagedError:
        return None


def _is_kept(record: Record | None, step: int, is_followed_up: bool) -> bool:
    if record is None:
        return False
    belongs_to_step = "train/loss" in record or "suspects" in record
    return record["step"] < step or (record["step"] == step and (is_followed_up or belongs_to_step))
