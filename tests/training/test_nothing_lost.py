"""What lies in a run's directory stays, whatever is done to it by hand: removed, damaged, or somebody else's."""

import hashlib
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from gpt2x.checkpoints.format import damage_of_final, write_final
from gpt2x.config import RunSection
from gpt2x.errors import UserError
from gpt2x.runs import directory as run_directory
from gpt2x.runs.directory import RunDirectory, locked, open_run_directory
from gpt2x.training.finish import finish
from gpt2x.training.loop import train
from gpt2x.training.start import make_trainer
from gpt2x.training.trainer import Trainer


def contents(directory):
    """Every file below a directory with its sha256."""
    files = [path for path in sorted(Path(directory).rglob("*")) if path.is_file()]
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def run(finished, recipe, changed, tmp_path):
    """A copy of the finished run, and the recipe that made it, there."""
    shutil.copytree(finished.path, tmp_path / "runs" / "tiny")
    return recipe, tmp_path / "runs" / "tiny"


# --- somebody else's directory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["final/model.safetensors"], ["config.yaml", "final/a"], ["notes.txt"]])
def test_a_directory_that_is_no_run_is_refused_and_stays_as_it_is(recipe, changed, tmp_path, names):
    for name in names:
        (tmp_path / "models" / "llama" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "models" / "llama" / name).write_text("a: 1")
    before = contents(tmp_path / "models")
    first = names[0].split("/")[0]
    message = rf"models/llama is no run: it holds {first}.*, which stays as it is; start another run with --run\.name"
    with pytest.raises(UserError, match=message):
        open_run_directory(changed(recipe, run={"dir": tmp_path / "models", "name": "llama"}), name="recipe")
    assert contents(tmp_path / "models") == before


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/abs", "a\n", "é", "x" * 250])
def test_a_name_that_is_no_directory_of_its_own_is_refused(name):
    with pytest.raises(ValueError, match=r"run\.name"):
        RunSection(name=name)


@pytest.mark.parametrize("name", ["..", ".", ""])
def test_a_recipe_whose_file_name_means_another_directory_is_refused(recipe, changed, name):
    with pytest.raises(UserError, match=r"the recipe's file name \('.*'\) is no name of a run"):
        open_run_directory(changed(recipe, run={"name": None}), name=name)


# --- without checkpoints ---------------------------------------------------------------------------------------------


def remove_the_directory(run_dir):
    shutil.rmtree(run_dir / "checkpoints")


def empty_the_directory(run_dir):
    for checkpoint in (run_dir / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)


def damage_all(run_dir):
    for file in (run_dir / "checkpoints").glob("*/manifest.json"):
        file.unlink()


@pytest.mark.parametrize("remove", [remove_the_directory, empty_the_directory, damage_all])
def test_a_finished_run_without_a_whole_checkpoint_is_not_started_over(run, changed, start, remove):
    recipe, path = run
    remove(path)
    before = contents(path)
    message = (
        r"tiny has no whole checkpoint to go on from.*, and what it holds \(final, stats.json, metrics.jsonl.*\) is "
        r"not given up .*; its model in .*final is whole: go on from it by --init_from .*/tiny/final --run.name NEW"
    )
    with pytest.raises(UserError, match=message):
        start(changed(recipe, train={"max_steps": 30}))
    assert contents(path) == before


def test_an_unfinished_run_whose_checkpoints_were_removed_is_not_started_over(recipe, pretrain, start):
    stopped = pretrain(recipe, stop_after=3)
    shutil.rmtree(stopped.path / "checkpoints")
    with pytest.raises(UserError, match=r"what it holds \(metrics.jsonl\) is not given up .*; bring its checkpoints"):
        start(recipe)
    assert len(stopped.records()) == 3


def test_a_directory_of_checkpoints_that_cannot_be_read_is_no_empty_one(recipe, pretrain, start, monkeypatch):
    stopped = pretrain(recipe, stop_after=3)
    original = os.listdir

    def refuse(path):
        if Path(path).name == "checkpoints":
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match=r"checkpoints cannot be read \(Permission denied\); mend that"):
        start(recipe)
    assert len(stopped.records()) == 3


def test_a_run_that_was_stopped_before_its_first_step_starts_over_with_any_recipe(recipe, changed, start):
    start(recipe)
    other = changed(recipe, optimizer={"learning_rate": 1e-4}, model={"num_hidden_layers": 3})
    job, progress = start(other)
    assert progress.step == 0
    assert yaml.safe_load(job.run.config_file.read_text())["optimizer"]["learning_rate"] == 1e-4


# --- final/ ----------------------------------------------------------------------------------------------------------


def delete(final):
    shutil.rmtree(final)


def cut(final):
    (final / "model.safetensors").write_bytes(b"abc")


def flip(final):
    content = bytearray((final / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (final / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize("damage", [delete, cut, flip])
def test_a_damaged_final_is_made_again_from_the_last_checkpoint(run, start, damage):
    recipe, path = run
    (path / "stats.json").write_text(
        json.dumps(json.loads((path / "stats.json").read_text()) | {"evaluation": {"other": {"acc": 0.5}}})
    )
    expected = contents(path / "final")
    assert damage_of_final(path / "final") is None
    damage(path / "final")
    assert damage_of_final(path / "final") is not None
    job, _ = start(recipe)
    with job.recorder:
        found = train(job)
    finish(job, found)
    assert contents(path / "final") == expected
    assert json.loads((path / "stats.json").read_text())["evaluation"] == {"other": {"acc": 0.5}}
    kept = [] if damage is delete else ["final.kept-1"]
    assert [name.name for name in path.glob("final*") if name.name != "final"] == kept


def test_a_damaged_final_without_a_checkpoint_is_said_to_be_one(run, start):
    recipe, path = run
    shutil.rmtree(path / "checkpoints")
    cut(path / "final")
    message = (
        r"what it holds \(final, stats.json, .*\) is not given up .*; its final/ is damaged \(model.safetensors has 3 "
        r"bytes instead of \d+\) and cannot be made again; bring its checkpoints back, or start another run"
    )
    with pytest.raises(UserError, match=message):
        start(recipe)


def test_a_final_of_an_older_version_is_looked_at_as_far_as_it_can_be(run):
    final = run[1] / "final"
    (final / "manifest.json").unlink()
    assert damage_of_final(final) is None
    cut(final)
    assert "model.safetensors is cut or damaged" in damage_of_final(final)
    (final / "model.safetensors").unlink()
    assert damage_of_final(final) == "it holds no model"


def test_what_others_have_put_into_final_is_kept_when_the_run_is_extended(run, tmp_path):
    final = run[1] / "final"
    (final / "model.gguf").write_text("mine")
    write_final(final, lambda directory: (directory / "config.json").write_text("{}") and "gpt2")
    assert contents(final).keys() == {"config.json", "manifest.json"}
    assert (run[1] / "final.kept-1" / "model.gguf").read_text() == "mine"
    write_final(final, lambda directory: (directory / "config.json").write_text("[]") and "gpt2")
    assert not (run[1] / "final.kept-2").exists()


def test_what_killed_writers_left_goes_and_what_others_have_put_there_stays(recipe, pretrain, start):
    stopped = pretrain(recipe, stop_after=3)
    for name in ("final.tmp-0123abcd", "onnx.tmp-0123abcd", "notes"):
        (stopped.path / name).mkdir()
    (stopped.path / "stats.json.tmp-0123abcd").touch()
    start(recipe)
    names = {path.name for path in stopped.path.iterdir()}
    assert names == {"checkpoints", "config.yaml", "metrics.jsonl", "onnx.tmp-0123abcd", "notes"}


# --- config.yaml -----------------------------------------------------------------------------------------------------


CONFIGS = {
    "missing": lambda path: None,
    "dangling": lambda path: path.symlink_to("nowhere"),
    "empty": Path.touch,
    "list": lambda path: path.write_text("- a"),
    "other": lambda path: path.write_text("a: 1"),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "directory": Path.mkdir,
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "tag": lambda path: path.write_text("!!python/object/apply:os.getcwd []"),
    "deep": lambda path: path.write_bytes(b"[" * 500),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_config_yaml_the_recipe_is_that_of_the_newest_checkpoint(run, changed, start, kind):
    recipe, path = run
    (path / "config.yaml").unlink()
    CONFIGS[kind](path / "config.yaml")
    other = changed(recipe, optimizer={"learning_rate": 0.01})
    with pytest.raises(UserError, match=r"another recipe; (.*\n)+optimizer.learning_rate  0.003  0.01"):
        open_run_directory(other, name="recipe")
    directory = open_run_directory(recipe, name="recipe")
    assert directory.is_finished()
    assert directory.notes[0].endswith(
        f"the recipe is that of {path}/checkpoints/step-000020, and is written there again."
    )
    run_directory.write_config(directory, recipe)
    assert open_run_directory(recipe, name="recipe").notes == ()


def test_where_nothing_tells_the_recipe_it_is_gone_on_with_only_where_that_is_asked_for(run, changed):
    recipe, path = run
    (path / "config.yaml").unlink()
    for file in path.glob("checkpoints/*/state/trainer.json"):
        file.write_text("{}")
    message = r"config.yaml is missing, and no checkpoint tells the recipe that ran there; if it is this one, go on by"
    with pytest.raises(UserError, match=message):
        open_run_directory(recipe, name="recipe")
    directory = open_run_directory(changed(recipe, resume=True), name="recipe")
    assert not directory.is_finished()
    assert directory.changes == {"recipe": ("unknown", "this one")}


# --- under way -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_directory_that_is_moved_or_removed_under_a_run_ends_it_and_is_not_made_anew(
    recipe, changed, pretrain, monkeypatch, is_removed
):
    """Between two records, so that a save is the first to notice."""
    path, original, hold = recipe.run.dir / "tiny", Trainer.reserve_copies, ExitStack()

    def moving(job):
        original(job)
        if job.progress.step == 5:
            job.saver.wait()
            shutil.rmtree(path) if is_removed else path.rename(path.with_name("moved"))

    def make_held_trainer(recipe, run, **options):
        return make_trainer(recipe, replace(run, hold=hold.enter_context(locked(run.path))), **options)

    monkeypatch.setattr(Trainer, "reserve_copies", moving)
    monkeypatch.setitem(pretrain.__globals__, "make_trainer", make_held_trainer)
    recipe = changed(recipe, train={"logging_steps": 50, "save_steps": 2}, evaluation={"eval_steps": None})
    with hold, pytest.raises(UserError, match=r"runs/tiny was moved or removed while the run was writing to it"):
        pretrain(recipe)
    assert not path.exists()
    if not is_removed:
        checkpoints = sorted((path.with_name("moved") / "checkpoints").iterdir())
        assert [checkpoint.name for checkpoint in checkpoints] == ["step-000002", "step-000004"]


def test_a_run_whose_lease_another_machine_has_taken_writes_nothing_more(recipe, tmp_path, monkeypatch):
    with locked(tmp_path) as hold:
        run = RunDirectory(tmp_path, hold=hold)
        run.append(run.metrics_file, {"step": 1})
        monkeypatch.setattr(type(hold.lease), "compromise", "owner-changed")
        with pytest.raises(UserError, match=r"was taken over by another process, since this one gave no sign of life"):
            run.append(run.metrics_file, {"step": 2})
    assert run.metrics_file.read_text() == '{"step": 1}\n'
