"""What a finished run leaves: the final model, the run in numbers, the plots."""

import json
import platform
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from gpt2x.errors import UserError
from gpt2x.evaluation import Validation
from gpt2x.models import flops_per_token, num_parameters
from gpt2x.reporting import column, read_metrics, write_plots
from gpt2x.training.devices import describe_device
from gpt2x.training.job import Job
from gpt2x.training.run_directory import RunDirectory, replace_file
from gpt2x.training.state import Progress


def finish(job: Job, progress: Progress, validation: Validation) -> None:
    """Writes final/, stats.json, losses.npy and the plots; the main process alone."""
    weights = job.trainee.weights(job.plain_model, is_writer=job.accelerator.is_main_process)
    if job.accelerator.is_main_process:
        model_type = save_final_model(job, weights)
        with job.failures.tolerated("plots", say=job.accelerator.print):
            write_curves(job.run)
        stats = _stats(job, progress) | validation.metrics() | {"model_type": model_type}
        if job.hellaswag is not None:
            stats["evaluation"] = job.hellaswag.results()
        replace_file(job.run.stats_file, (json.dumps(stats, indent=2) + "\n").encode())
    job.accelerator.wait_for_everyone()


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
    """Writes final/, whole or not at all, and returns its model_type.

    Raises:
        UserError: where it cannot be written; the last checkpoint has the same weights.
    """
    final, partial = job.run.final_dir, job.run.path / "final.tmp"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model_type = job.trainee.save_final(job.plain_model, partial, job.tokenizer, weights=weights)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{final} could not be written ({error}); make room, and the same command writes it; the last checkpoint "
            f"is whole."
        ) from error
    return model_type


def write_curves(run: RunDirectory) -> None:
    """losses.npy, the recorded training losses in order, and the plots."""
    _, losses = column(read_metrics(run.path), "train/loss")
    np.save(run.path / "losses.npy", losses)
    write_plots(run.path)


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
