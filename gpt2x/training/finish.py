"""What a finished run leaves: the final model, the run in numbers, the plots."""

import io
import json
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from gpt2x.checkpoints.final_model import write_final
from gpt2x.checkpoints.progress import Progress
from gpt2x.distributed.devices import describe_device
from gpt2x.distributed.flags import wait_for_main
from gpt2x.evaluation.validation import Validation
from gpt2x.files import write_file
from gpt2x.models import flops_per_token, num_parameters
from gpt2x.reporting import column, read_metrics, write_plots
from gpt2x.runs.directory import RunDirectory
from gpt2x.runs.results import recorded_results
from gpt2x.training.job import Job


def finish(job: Job, progress: Progress, validation: Validation) -> None:
    """Writes final/, losses.npy, the plots and stats.json, by which the run is finished; the main process alone.

    Raises:
        UserError: where they cannot be written; the last checkpoint has the same weights.
    """
    weights = job.trainee.weights(job.plain_model, is_writer=job.accelerator.is_main_process)
    if job.accelerator.is_main_process:
        job.run.check()
        job.run.sync_records()
        model_type = save_final_model(job, weights)
        write_losses(job.run)
        with job.failures.tolerated("plots", say=job.accelerator.print):
            write_plots(job.run.path)
        stats = _stats(job, progress) | validation.metrics() | {"model_type": model_type}
        write_stats(job, stats)
    wait_for_main(job.accelerator)


def push(job: Job) -> None:
    """Uploads the finished run where the recipe says so; what fails there is told, and the run has ended well."""
    hub = job.recipe.hub
    if not hub.push or not job.accelerator.is_main_process:
        return
    from gpt2x.publishing.hub import Push, push_run

    assert hub.repo_id is not None
    with job.failures.tolerated("push", say=job.accelerator.print):
        url = push_run(job.run.path, Push(repo_id=hub.repo_id, is_public=hub.public, license=hub.license))
        job.accelerator.print(f"published:      {url}")


def save_final_model(job: Job, weights: Mapping[str, Tensor]) -> str:
    """Writes final/, whole or not at all, and returns its model_type."""
    return write_final(
        job.run.final_dir,
        lambda directory: job.trainee.save_final(job.plain_model, directory, job.tokenizer, weights=weights),
    )


def write_losses(run: RunDirectory) -> None:
    """losses.npy: the recorded training losses in order."""
    _, losses = column(read_metrics(run.path), "train/loss")
    content = io.BytesIO()
    np.save(content, losses)
    write_file(run.losses_file, content.getvalue())


def write_stats(job: Job, stats: dict[str, Any]) -> None:
    """stats.json, with the evaluations that were recorded of these weights before final/ was made again."""
    evaluation = {} if job.hellaswag is None else job.hellaswag.results()
    evaluation = recorded_results(job.run.stats_file) | evaluation
    if evaluation:
        stats["evaluation"] = evaluation
    job.run.check()
    write_file(job.run.stats_file, (json.dumps(stats, indent=2) + "\n").encode())


def _stats(job: Job, progress: Progress) -> dict[str, Any]:
    total, _ = num_parameters(job.plain_model)
    flops = flops_per_token(job.plain_model, job.recipe.data.sequence_length)
    return {
        "finished": True,
        "steps": progress.step,
        "tokens": progress.tokens,
        "elapsed_s": progress.elapsed_s,
        "tokens_per_s": progress.tokens / progress.elapsed_s,
        "parameters": total,
        "flops": flops * progress.tokens,
        "devices": describe_device(job.accelerator),
        "data": job.batches.batches.accounts(progress.step),
        "data_fingerprints": {name: source.fingerprint for name, source in job.batches.batches.sources.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
