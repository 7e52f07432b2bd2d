"""The list of evaluators: when each runs, what becomes of its metrics, and that another one is one class more."""

import json
from dataclasses import replace

import pytest

from gpt2x.training.evaluators import Evaluator
from gpt2x.training.finish import finish
from gpt2x.training.loop import train
from gpt2x.training.signals import StopRequest


class NormOfWeights(Evaluator):
    """The whole of another benchmark."""

    def __init__(self, *, every_steps):
        super().__init__("norm", every_steps=every_steps)
        self.latest = None

    def run(self, model, accelerator, is_stopped):
        if is_stopped():
            return None
        self.latest = sum(weight.norm().item() for weight in model.parameters())
        return {"norm/sum": self.latest}

    def summary(self):
        return f"of the weights {self.latest:.3f}"

    def results(self):
        return {"norm": {"sum": self.latest}}


@pytest.fixture
def job(recipe, changed, start):
    """A run of six steps with the validation every third, and the norm every second."""
    made, _ = start(changed(recipe, train={"max_steps": 6}, evaluation={"eval_steps": 3, "prompts": ["def"]}))
    return replace(made, evaluators=[*made.evaluators, NormOfWeights(every_steps=2)])


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_another_benchmark_is_recorded_shown_and_kept_with_the_results(job, capsys):
    with job.recorder:
        found = train(job)
    finish(job, found)
    records = read(job.run.metrics_file)
    norms = {record["step"]: record["norm/sum"] for record in records if "norm/sum" in record}
    losses = {record["step"]: record["val/loss"] for record in records if "val/loss" in record}
    assert (list(norms), list(losses)) == ([2, 4, 6], [3, 6])
    assert found["norm/sum"] == norms[6] == sum(weight.norm().item() for weight in job.plain_model.parameters())
    shown = [line for line in capsys.readouterr().out.splitlines() if ": norm " in line]
    assert shown == [f"step {step}: norm of the weights {norm:.3f}" for step, norm in norms.items()]
    stats = json.loads(job.run.stats_file.read_text())
    assert stats["evaluation"] == {"norm": {"sum": norms[6]}}
    assert stats["val/loss"] == losses[6]
    assert "norm/sum" not in stats


def test_evaluators_run_in_their_order(job):
    with job.recorder:
        train(job)
    kinds = [next(iter(record.keys() - {"step", "tokens", "elapsed_s"})) for record in read(job.run.metrics_file)[-2:]]
    assert [kind.partition("/")[0] for kind in kinds] == ["val", "norm"]


class StopAtNorm(StopRequest):
    """A request to stop that comes while the norm of step 4 is taken."""

    def __init__(self, job):
        super().__init__()
        self.progress, self.times_asked = job.progress, 0

    def is_asked(self):
        self.times_asked += self.progress.step == 4
        return self.times_asked >= 1


def test_a_stop_within_an_evaluator_ends_the_run_before_its_end(job):
    with job.recorder:
        assert train(replace(job, stop=StopAtNorm(job))) is None
    assert (job.progress.step, job.progress.is_followed_up) == (4, False)
    assert [record["step"] for record in read(job.run.metrics_file) if "norm/sum" in record] == [2]
