"""Learning rates and budgets against formulas written down here."""

import itertools
import math

import pytest

from gpt2x.checkpoints.progress import Progress
from gpt2x.config import OptimizerSection, TrainSection
from gpt2x.training.schedules import learning_rate_factor, make_budget


def factors(schedule, train):
    """The factor of every step of a step or token budget."""
    budget = make_budget(train, schedule)
    positions = [Progress(step=step) for step in range(budget.max_steps)]
    return [learning_rate_factor(schedule, warmup=budget.warmup(p), progress=budget.decay(p)) for p in positions]


def hundred_steps(**fields):
    return factors(OptimizerSection(**fields), TrainSection(max_steps=100))


def test_warmup_rises_linearly_and_its_last_step_has_the_peak():
    rates = hundred_steps(warmup_steps=10, lr_scheduler_type="wsd", decay_ratio=0.1)
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10] == 1.0


def test_cosine_falls_from_the_peak_along_half_a_wave():
    rates = hundred_steps(warmup_steps=20, lr_scheduler_type="cosine", min_lr_ratio=0.2)
    expected = [0.2 + 0.8 * math.cos(math.pi / 2 * (step - 20) / 80) ** 2 for step in range(20, 100)]
    assert rates[20:] == pytest.approx(expected, abs=1e-12)


def test_linear_falls_by_the_same_amount_every_step():
    rates = hundred_steps(lr_scheduler_type="linear", min_lr_ratio=0.0)
    assert rates == pytest.approx([(100 - step) / 100 for step in range(100)])


def test_wsd_is_stable_until_the_decay_and_linear_from_there():
    rates = hundred_steps(lr_scheduler_type="wsd", decay_ratio=0.4, min_lr_ratio=0.1)
    assert rates[:61] == [1.0] * 61
    assert rates[60:] == pytest.approx([1.0 - 0.9 * (step - 60) / 40 for step in range(60, 100)])


def test_wsd_without_a_decay_stays_at_the_peak():
    assert hundred_steps(lr_scheduler_type="wsd", decay_ratio=0.0) == [1.0] * 100


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("progress", [1.0, 1.7])
def test_every_schedule_ends_at_its_floor_and_stays_there(name, progress):
    schedule = OptimizerSection(lr_scheduler_type=name, min_lr_ratio=0.05)
    assert learning_rate_factor(schedule, warmup=9.0, progress=progress) == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_no_schedule_rises_after_the_warmup(name):
    rates = hundred_steps(lr_scheduler_type=name, warmup_steps=5)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[5:]))


def test_a_warmup_below_one_is_a_share_of_the_budget():
    assert make_budget(TrainSection(max_steps=200), OptimizerSection(warmup_steps=0.1)).warmup_steps == 20


def test_a_warmup_longer_than_the_budget_fills_it():
    assert hundred_steps(warmup_steps=1000)[-1] == 1.0


@pytest.mark.parametrize(("max_tokens", "steps"), [(1000, 1), (1024, 1), (1025, 2), (10_240, 10)])
def test_a_token_budget_is_rounded_up_to_whole_steps(max_tokens, steps):
    budget = make_budget(TrainSection(max_tokens=max_tokens, tokens_per_step=1024), OptimizerSection())
    assert budget.max_steps == steps


def test_the_budget_of_steps_is_spent_with_the_last_one():
    budget = make_budget(TrainSection(max_steps=3), OptimizerSection())
    assert [budget.is_spent(Progress(step=step)) for step in (0, 2, 3, 4)] == [False, False, True, True]


def test_a_time_budget_ends_before_the_step_that_would_overrun_it():
    budget = make_budget(TrainSection(max_time_s=10.0), OptimizerSection())
    assert not budget.is_spent(Progress(elapsed_s=8.5, step_s=1.5))
    assert budget.is_spent(Progress(elapsed_s=8.6, step_s=1.5))


def test_the_schedule_of_a_time_budget_follows_the_clock_to_its_end():
    schedule = OptimizerSection(lr_scheduler_type="linear", min_lr_ratio=0.0)
    budget = make_budget(TrainSection(max_time_s=10.0), schedule)
    elapsed = (0.0, 5.0, 9.0, 10.0)
    decays = [budget.decay(Progress(step=7, elapsed_s=seconds)) for seconds in elapsed]
    assert decays == [0.0, 0.5, 0.9, 1.0]
    assert learning_rate_factor(schedule, warmup=1.0, progress=decays[-1]) == 0.0


def test_the_time_left_is_what_the_clock_or_the_mean_step_says():
    by_clock = make_budget(TrainSection(max_time_s=10.0), OptimizerSection())
    by_steps = make_budget(TrainSection(max_steps=10), OptimizerSection())
    progress = Progress(step=4, elapsed_s=8.0)
    assert (by_clock.remaining_s(progress), by_steps.remaining_s(progress)) == (2.0, 12.0)
    assert by_clock.remaining_s(Progress(elapsed_s=11.0)) == 0.0
