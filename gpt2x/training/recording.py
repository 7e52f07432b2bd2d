"""What a run records: metrics, samples, the progress bar and the trackers."""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from gpt2x.addresses import without_secrets
from gpt2x.checkpoints.progress import Progress
from gpt2x.distributed.devices import peak_flops
from gpt2x.distributed.flags import part
from gpt2x.models import flops_per_token
from gpt2x.training.job import Job

# Waiting for data is worth a line when it takes this long, and this share of a step; and a line once in a while.
_WAITED_S, _WAITED_SHARE, _SILENCE_S = 0.5, 0.2, 60.0


class Recorder:
    """Writes a job's metrics on the main process, and shows them."""

    def __init__(self, job: Job) -> None:
        self.run, self.accelerator, self.budget, self.failures = job.run, job.accelerator, job.budget, job.failures
        peak = peak_flops(job.accelerator.device)
        flops = flops_per_token(job.plain_model, job.recipe.data.sequence_length)
        self.utilization_per_token_rate = flops / (peak * job.accelerator.num_processes) if peak else None
        budget, accelerator = job.budget, job.accelerator
        total = budget.max_steps if budget.max_steps is not None else budget.max_time_s
        unit = "step" if budget.max_steps is not None else "s"
        layout = "{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}{postfix}]"
        self.bar = tqdm(
            total=total, unit=unit, bar_format=layout, disable=not accelerator.is_main_process, dynamic_ncols=True
        )
        self._shown, self._warned = 0.0, -math.inf
        with self.failures.tolerated("tracker", say=self.say):
            accelerator.init_trackers("gpt2x", config=_scalars(without_secrets(dataclasses.asdict(job.recipe))))

    def record(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl and sends it to the trackers. What is not finite is recorded as null.

        Raises:
            UserError: where the line cannot be written, or this process must not write here any more.
        """
        if self.accelerator.is_main_process:
            line = {"step": progress.step, "tokens": progress.tokens, "elapsed_s": round(progress.elapsed_s, 3)}
            values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self.run.append(self.run.metrics_file, line | values)
        with self.failures.tolerated("tracker", say=self.say):
            self.accelerator.log(dict(metrics), step=progress.step)

    def note_waiting(self, waited_s: float, seconds: float) -> None:
        """Says, at most once a minute, that a step has waited for its data."""
        if waited_s > max(_WAITED_S, _WAITED_SHARE * seconds) and time.monotonic() - self._warned > _SILENCE_S:
            self._warned = time.monotonic()
            self.say(
                f"training waits for its data: {waited_s:.1f} s of a step of {seconds:.1f} s; raise data.num_workers "
                f"and data.prefetch_steps, or put the data on a faster disk."
            )

    def show(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Moves the progress bar, at most five times a second."""
        if self.bar.disable or time.monotonic() - self._shown < 0.2:
            return
        self._shown = time.monotonic()
        self.bar.n = progress.step if self.budget.max_steps is not None else progress.elapsed_s
        self.bar.set_postfix_str(self._summary(progress, metrics), refresh=True)

    def say(self, text: str) -> None:
        """Prints above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            self.bar.write(text)

    def close(self) -> None:
        """Ends the progress bar."""
        self.bar.close()

    def end(self) -> None:
        """Ends the trackers, and with them the talk between the processes."""
        with self.failures.tolerated("tracker", say=self.say):
            self.accelerator.end_training()
        part(self.accelerator)  # also where a tracker failed

    def _summary(self, progress: Progress, metrics: Mapping[str, float]) -> str:
        shown = [
            f"loss {metrics['train/loss']:.3f}",
            f"lr {metrics['learning_rate']:.2e}",
            f"norm {metrics['grad_norm']:.2f}",
            f"{metrics['tokens_per_s']:,.0f} tok/s",
        ]
        if self.utilization_per_token_rate is not None:
            shown.append(f"MFU {metrics['tokens_per_s'] * self.utilization_per_token_rate:.1%}")
        return ", ".join([*shown, f"{self.budget.remaining_s(progress):.0f} s left"])


def _scalars(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves that every tracker can hold, by dotted name."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _scalars(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return leaves
