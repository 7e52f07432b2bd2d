"""What a run announces is on the disk: in which order it gets there."""

import os
from pathlib import Path

import pytest

from gpt2x import files
from gpt2x.training.finish import finish


@pytest.fixture
def events(monkeypatch):
    """What is flushed to the disk, with its size, and what gets its name, in order."""
    seen, fsync, replace, rename = [], os.fsync, Path.replace, Path.rename

    def noting_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)
        seen.append(("sync", path, os.fstat(descriptor).st_size))

    def noting(original):
        def renaming(path, target):
            result = original(path, target)
            seen.append(("name", Path(target), None))
            return result

        return renaming

    monkeypatch.setattr(files.os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting(replace))
    monkeypatch.setattr(Path, "rename", noting(rename))
    return seen


def position(events, kind, path):
    (found,) = [number for number, event in enumerate(events) if event[:2] == (kind, path)]
    return found


def test_no_checkpoint_has_its_name_before_the_records_of_its_steps_are_on_the_disk(recipe, pretrain, events):
    run = pretrain(recipe)
    lines = run.job.run.metrics_file.read_bytes().split(b"\n")
    for step in (10, 20):
        needed = next(number for number, line in enumerate(lines) if line.startswith(b'{"step": %d,' % step))
        size = sum(len(line) + 1 for line in lines[: needed + 1])
        named = position(events, "name", run.path / "checkpoints" / f"step-{step:06d}")
        synced = [event[2] for event in events[:named] if event[:2] == ("sync", run.job.run.metrics_file)]
        assert max(synced) >= size
        # and the entry of the file in its directory
        assert ("sync", run.path) in [event[:2] for event in events[:named]]


def test_every_file_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(recipe, pretrain, events):
    run = pretrain(recipe, stop_after=3)
    target = run.path / "checkpoints" / "step-000003"
    named = position(events, "name", target)
    depth = len(target.parts)
    synced = {
        (path.parts[depth:], size)
        for kind, path, size in events[:named]
        if kind == "sync" and path.parts[: depth - 1] == target.parts[:-1]
    }
    for file in target.rglob("*"):
        if file.is_file():
            assert (file.relative_to(target).parts, file.stat().st_size) in synced
    assert events[named + 1][:2] == ("sync", target.parent)


def test_a_run_is_finished_after_everything_else_is_on_the_disk(recipe, pretrain, events):
    run = pretrain(recipe)
    del events[:]
    finish(run.job, run.found)
    order = [path.name for kind, path, _ in events if kind == "name" and path.parent == run.path]
    assert order == ["final", "losses.npy", "stats.json"]
    records = position(events, "sync", run.job.run.metrics_file), position(events, "sync", run.job.run.samples_file)
    assert max(records) < position(events, "name", run.path / "final")
    assert events[-1][:2] == ("sync", run.path)


def test_files_of_a_run_have_the_mode_that_the_umask_gives(recipe, pretrain):
    former = os.umask(0o002)
    try:
        run = pretrain(recipe, finishes=True)
    finally:
        os.umask(former)
    modes = {path.stat().st_mode & 0o777 for path in run.path.rglob("*") if path.is_file()}
    assert modes == {0o664}
    assert {path.stat().st_mode & 0o777 for path in run.path.rglob("*") if path.is_dir()} == {0o775}
