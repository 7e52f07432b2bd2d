"""Which checkpoints are kept, and where a larger budget goes on from."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from gpt2x.checkpoints.format import (
    list_checkpoints,
    newest_checkpoint,
    read_trainer,
    write_checkpoint,
)
from gpt2x.checkpoints.progress import Progress
from gpt2x.checkpoints.retention import note_validation, prune
from gpt2x.config import TrainSection
from gpt2x.runs.layout import checkpoint_dir

WSD = {"lr_scheduler_type": "wsd", "decay_ratio": 0.4, "warmup_steps": 0}


def write(run_dir, step, **trainer):
    target, trainer = checkpoint_dir(run_dir, step), {"step": step} | trainer
    write_checkpoint(
        target, write_model=lambda directory: directory.mkdir(), optimizer={"a": torch.ones(2)}, trainer=trainer
    )
    return trainer


def steps(run_dir):
    return [int(path.name[5:]) for path in list_checkpoints(run_dir)]


def keep(**rules):
    """A recipe's rules of what is kept."""
    return TrainSection(max_steps=6, save_steps=1, **rules)


RULES = {
    "newest": ({"save_total_limit": 2}, {}, [5, 6]),
    "all": ({"save_total_limit": None}, {}, [1, 2, 3, 4, 5, 6]),
    "every third": ({"save_total_limit": 1, "keep_steps": 3}, {}, [3, 6]),
    "best": ({"save_total_limit": 2, "save_best": True}, {"best_step": 2}, [2, 5, 6]),
    "best, not asked for": ({"save_total_limit": 2}, {"best_step": 2}, [5, 6]),
}


@pytest.mark.parametrize("rule", RULES)
def test_what_the_rules_do_not_keep_is_deleted(tmp_path, rule):
    rules, trainer, kept = RULES[rule]
    for step in range(1, 7):
        newest = write(tmp_path, step, **trainer)
    prune(tmp_path, newest, keep(**rules))
    assert steps(tmp_path) == kept


def test_what_killed_saves_left_is_deleted(tmp_path):
    newest = write(tmp_path, 4)
    (tmp_path / "checkpoints" / "step-000003.tmp-01234567").mkdir()
    prune(tmp_path, newest, keep(save_total_limit=None))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path):
    for step in (1, 2, 3):
        newest = write(tmp_path, step)
    (checkpoint_dir(tmp_path, 3) / "manifest.json").unlink()
    prune(tmp_path, newest, keep(save_total_limit=1))
    assert steps(tmp_path) == [2]


def test_the_last_checkpoint_before_the_decay_is_kept_and_those_of_another_decay_are_not(tmp_path):
    for step, decays_to in ((2, None), (4, None), (5, 8), (6, 20), (7, 20), (8, 20)):
        newest = write(tmp_path, step, decays_to=decays_to)
    prune(tmp_path, newest, keep(save_total_limit=2))
    assert steps(tmp_path) == [4, 7, 8]


# --- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_with_a_decay_saves_where_it_begins_whatever_the_interval(recipe, changed, pretrain):
    run = pretrain(changed(recipe, optimizer=WSD, train={"save_total_limit": 1, "save_steps": None}))
    rates = [record["learning_rate"] for record in run.records() if "train/loss" in record]
    # step 13 begins at a progress of 0.6 and is the last at the peak
    assert [rate == 3e-3 for rate in rates] == [True] * 13 + [False] * 7
    assert steps(run.path) == [13, 20]


def test_a_larger_budget_goes_on_from_before_the_decay_and_ends_as_one_that_was_larger_from_the_start(
    recipe, changed, pretrain, assert_equal_tensors, tmp_path
):
    pretrain(changed(recipe, optimizer=WSD, train={"save_steps": 4}), finishes=True)
    longer = changed(recipe, optimizer=WSD, train={"save_steps": 4, "max_steps": 30})
    extended = pretrain(longer)
    straight = pretrain(changed(longer, run={"dir": tmp_path / "straight"}))
    assert extended.records() == straight.records()
    assert_equal_tensors(extended.saved(), straight.saved())
    assert steps(extended.path) == steps(straight.path) == [19, 28, 30]


def test_an_extension_that_is_stopped_goes_on_by_itself(recipe, changed, pretrain, start):
    pretrain(changed(recipe, optimizer=WSD, train={"save_steps": 4}))
    longer = changed(recipe, optimizer=WSD, train={"save_steps": 4, "max_steps": 30})
    stopped = pretrain(longer, stop_after=15)
    assert stopped.progress.step == 15
    assert start(longer)[1].step == 15
    assert pretrain(longer).progress.step == 30


def test_without_a_checkpoint_from_before_the_decay_the_run_goes_on_from_the_newest_and_says_so(
    recipe, changed, pretrain, capsys
):
    first = pretrain(changed(recipe, optimizer=WSD, train={"save_steps": None}))
    (first.path / "checkpoints" / "step-000013").rename(first.path / "elsewhere")
    extended = pretrain(changed(recipe, optimizer=WSD, train={"save_steps": None, "max_steps": 30}))
    line = "step-000020 has begun to decay to another budget, and none from before is left; going on from it."
    assert line in capsys.readouterr().out
    assert [record["step"] for record in extended.records() if "train/loss" in record] == list(range(1, 31))


def test_the_checkpoint_of_the_best_validation_is_made_and_kept(recipe, changed, pretrain):
    """A learning rate that is raised far too high after ten steps makes an early validation the best."""
    ruined = {"learning_rate": 1.0, "lr_scheduler_type": "linear"}
    train = {"save_best": True, "save_steps": None, "save_total_limit": 1}
    pretrain(changed(recipe, train=train, evaluation={"eval_steps": 3}), stop_after=10)
    run = pretrain(changed(recipe, train=train, evaluation={"eval_steps": 3}, optimizer=ruined, resume=True))
    losses = {record["step"]: record["val/loss"] for record in run.records() if "val/loss" in record}
    best = min(losses, key=losses.get)
    assert best < 12
    assert steps(run.path) == [best, 20]
    trainer = json.loads((run.path / "checkpoints" / "step-000020" / "state" / "trainer.json").read_text())
    assert (trainer["best_step"], trainer["best_val_loss"]) == (best, losses[best])


def test_the_validation_at_the_end_may_be_the_best_and_a_larger_budget_knows_of_it(recipe, changed, pretrain):
    train = {"save_best": True, "save_steps": None, "save_total_limit": 1}
    first = changed(recipe, train=train | {"max_steps": 9}, evaluation={"eval_steps": 3})
    run = pretrain(first)
    assert (run.progress.best_step, steps(run.path)) == (9, [9])
    ruined = {"learning_rate": 1.0, "lr_scheduler_type": "linear"}
    longer = changed(first, train={"max_steps": 15}, optimizer=ruined, resume=True)
    extended = pretrain(longer)
    losses = {record["step"]: record["val/loss"] for record in extended.records() if "val/loss" in record}
    assert min(losses, key=losses.get) == 9
    assert (extended.progress.best_step, extended.progress.best_val_loss) == (9, losses[9])
    assert steps(run.path) == [9, 15]


# --- what is not as it was -------------------------------------------------------------------------------------------


def test_an_older_checkpoint_that_is_damaged_is_told_once_and_left(tmp_path, capsys):
    for step in (1, 2, 3):
        newest = write(tmp_path, step)
    trainer = checkpoint_dir(tmp_path, 1) / "state" / "trainer.json"
    trainer.write_bytes(trainer.read_bytes().replace(b"step", b"st\xe9p"))
    for _ in range(2):
        prune(tmp_path, newest, keep(save_total_limit=1))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000003"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/checkpoints/step-000001 is damaged (")


def test_links_strange_files_and_other_digits_are_neither_deleted_nor_in_the_way(tmp_path):
    for step in (1, 2, 3):
        newest = write(tmp_path, step)
    checkpoints, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    (checkpoints / "step-000001").rename(elsewhere)
    (checkpoints / "step-000001").symlink_to(elsewhere)
    (checkpoints / "step-000004.tmp-01234567").symlink_to(elsewhere)
    os.mkfifo(checkpoints / "step-000005.tmp-01234567")
    os.mkfifo(checkpoints / "step-000009")
    (checkpoints / "step-٠٠٠٠١٣").mkdir()
    before = {path.name for path in checkpoints.iterdir()}
    assert steps(tmp_path) == [1, 2, 3]
    prune(tmp_path, newest, keep(save_total_limit=2))
    assert steps(tmp_path) == [1, 2, 3]
    prune(tmp_path, newest, keep(save_total_limit=1))
    assert {path.name for path in checkpoints.iterdir()} == before - {"step-000002"}
    assert (elsewhere / "manifest.json").exists()
    assert newest_checkpoint(tmp_path) == (checkpoint_dir(tmp_path, 3), [LINE.format(checkpoint_dir(tmp_path, 9))])


LINE = "{} is damaged (manifest.json cannot be read (Not a directory)); looking for an older one."


def test_a_checkpoint_that_may_not_be_deleted_is_told_once_and_stays_whole(tmp_path, capsys, monkeypatch):
    for step in (1, 2):
        newest = write(tmp_path, step)

    def refuse(path, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    for _ in range(2):
        prune(tmp_path, newest, keep(save_total_limit=1))
    assert steps(tmp_path) == [1, 2]
    assert capsys.readouterr().err.count("step-000001 could not be removed (Permission denied)") == 1


def test_a_link_to_a_disk_that_is_gone_is_kept_where_its_checkpoint_is_made_again(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-000002").symlink_to("gone")
    write(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]
    assert (tmp_path / "checkpoints" / "step-000002.kept-1").is_symlink()


def test_a_validation_loss_that_is_none_is_never_the_best():
    progress = Progress(step=3)
    assert not note_validation(progress, math.nan)
    assert note_validation(progress, 2.0)
    assert not note_validation(progress, -math.inf)
    assert (progress.best_val_loss, progress.best_step) == (2.0, 3)


def test_a_checkpoint_of_an_older_version_with_a_best_loss_that_is_none_is_gone_on_from(tmp_path):
    target = checkpoint_dir(tmp_path, 1)
    write(tmp_path, 1, best_val_loss=1.5)
    trainer = target / "state" / "trainer.json"
    trainer.write_text(trainer.read_text().replace("1.5", "NaN"))
    assert read_trainer(target)["best_val_loss"] is None


def test_what_is_no_number_is_never_written_into_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path, 1, best_val_loss=math.nan)
    assert list((tmp_path / "checkpoints").iterdir()) == []
