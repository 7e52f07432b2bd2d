"""What a run records: metrics, samples, the progress bar and the trackers; and what may fail without ending it."""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from gpt2x.addresses import without_secrets
from gpt2x.checkpoints.progress import Progress
from gpt2x.config import TrainingRecipe
from gpt2x.distributed.devices import peak_flops
from gpt2x.distributed.ranks import part
from gpt2x.runs.directory import RunDirectory
from gpt2x.training.schedules import Budget

# Waiting for data is worth a line when it takes this long, and this share of a step; and a line once in a while.
_WAITED_S, _WAITED_SHARE, _SILENCE_S = 0.5, 0.2, 60.0


class Failures:
    """Counts failures of what may fail, trackers, samples, plots and pushes, and keeps the last of each."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Nothing has failed yet; say takes a line for the first failure of each kind."""
        self._say = say
        self._counts: Counter[str] = Counter()
        self._last: dict[str, str] = {}

    @contextmanager
    def tolerated(self, what: str) -> Iterator[None]:
        """Lets the block, which is named as "tracker" is, fail: the first time says so, after that only counts."""
        try:
            yield
        # Trackers, plots and generation raise whatever their libraries and networks raise; the run is worth more.
        except Exception as error:
            self._counts[what] += 1
            self._last[what] = " ".join(f"{type(error).__name__}: {error}".split())
            if self._counts[what] == 1:
                self._say(f"{what} failed ({self._last[what]}); the run goes on.")

    def summary(self) -> list[str]:
        """A line for each thing that failed."""
        return [f"{what} failed {count} x, last: {self._last[what]}" for what, count in self._counts.items()]


class Recorder:
    """Writes a run's records on the main process, and shows them.

    As a context manager it starts the trackers and has a progress bar.

    Attributes:
        failures: what has failed without ending the run.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        run: RunDirectory,
        *,
        accelerator: Accelerator,
        budget: Budget,
        progress: Progress,
        flops_per_token: float,
    ) -> None:
        """Shows nothing yet.

        Args:
            recipe: told to the trackers.
            run: where to write.
            accelerator: of the run.
            budget: how far the progress bar reaches.
            progress: where the run stands, whenever something is recorded.
            flops_per_token: of training, for the share of the devices' peak that is used.
        """
        self.recipe, self.run, self.accelerator, self.budget, self.progress = (
            recipe,
            run,
            accelerator,
            budget,
            progress,
        )
        self.failures = Failures(self.say)
        peak = peak_flops(accelerator.device)
        self._utilization_per_token_rate = flops_per_token / (peak * accelerator.num_processes) if peak else None
        self._shown, self._warned = 0.0, -math.inf

    def __enter__(self) -> "Recorder":
        counts_steps = self.budget.max_steps is not None
        unit = "step" if counts_steps else "s"
        layout = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}{postfix}]"
        is_hidden = not self.accelerator.is_main_process
        self.bar = tqdm(total=self.budget.size, unit=unit, bar_format=layout, disable=is_hidden, dynamic_ncols=True)
        with self.failures.tolerated("tracker"):
            config = _scalars(without_secrets(dataclasses.asdict(self.recipe)))
            self.accelerator.init_trackers("gpt2x", config=config)
        return self

    def __exit__(self, *_exception: object) -> None:
        self.bar.close()

    def record(self, metrics: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl and sends it to the trackers. What is not finite is recorded as null.

        Raises:
            UserError: where the line cannot be written, or this process must not write here any more.
        """
        progress = self.progress
        if self.accelerator.is_main_process:
            line = {"step": progress.step, "tokens": progress.tokens, "elapsed_s": round(progress.elapsed_s, 3)}
            values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self.run.append(self.run.metrics_file, line | values)
        with self.failures.tolerated("tracker"):
            self.accelerator.log(dict(metrics), step=progress.step)

    def record_sample(self, prompt: str, text: str) -> None:
        """Appends one line to samples.jsonl, and shows the text."""
        if self.accelerator.is_main_process:
            self.run.append(self.run.samples_file, {"step": self.progress.step, "prompt": prompt, "text": text})
            self.say(f"--- sample at step {self.progress.step} ---\n{prompt}>>>{text}")

    def note_waiting(self, waited_s: float, seconds: float) -> None:
        """Says, at most once a minute, that a step has waited for its data."""
        if waited_s > max(_WAITED_S, _WAITED_SHARE * seconds) and time.monotonic() - self._warned > _SILENCE_S:
            self._warned = time.monotonic()
            self.say(
                f"training waits for its data: {waited_s:.1f} s of a step of {seconds:.1f} s; raise data.num_workers "
                f"and data.prefetch_steps, or put the data on a faster disk."
            )

    def show(self, metrics: Mapping[str, float]) -> None:
        """Moves the progress bar, at most five times a second."""
        if self.bar.disable or time.monotonic() - self._shown < 0.2:
            return
        self._shown = time.monotonic()
        self.bar.n = self.progress.step if self.budget.max_steps is not None else self.progress.elapsed_s
        self.bar.set_postfix_str(self._summary(metrics), refresh=True)

    def say(self, text: str) -> None:
        """Prints above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def end(self) -> None:
        """Ends the trackers, and with them the talk between the processes."""
        with self.failures.tolerated("tracker"):
            self.accelerator.end_training()
        part(self.accelerator)  # also where a tracker failed

    def _summary(self, metrics: Mapping[str, float]) -> str:
        shown = [
            f"loss {metrics['train/loss']:.3f}",
            f"lr {metrics['learning_rate']:.2e}",
            f"norm {metrics['grad_norm']:.2f}",
            f"{metrics['tokens_per_s']:,.0f} tok/s",
        ]
        if self._utilization_per_token_rate is not None:
            shown.append(f"MFU {metrics['tokens_per_s'] * self._utilization_per_token_rate:.1%}")
        return ", ".join([*shown, f"{self.budget.remaining_s(self.progress):.0f} s left"])


def _scalars(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves that every tracker can hold, by dotted name."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _scalars(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return leaves
