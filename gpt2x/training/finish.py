"""What a finished run leaves: the final model, the run in numbers, the plots."""

import io
import json
import platform
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers

from gpt2x.checkpoints.format import write_final
from gpt2x.distributed.devices import describe_device
from gpt2x.distributed.ranks import wait_for_main
from gpt2x.files import write_file
from gpt2x.models import flops_per_token, num_parameters
from gpt2x.reporting import column, read_metrics, write_plots
from gpt2x.runs.directory import RunDirectory
from gpt2x.runs.results import recorded_results
from gpt2x.training.evaluators import Metrics
from gpt2x.training.trainer import Trainer


def finish(trainer: Trainer, found: Metrics) -> None:
    """Writes final/, losses.npy, the plots and stats.json, by which the run is finished; the main process alone.

    Args:
        trainer: of the run.
        found: what the evaluators found at the end.

    Raises:
        UserError: where they cannot be written; the last checkpoint has the same weights.
    """
    weights = trainer.trainee.weights(trainer.plain_model, is_writer=trainer.accelerator.is_main_process)
    if trainer.accelerator.is_main_process:
        trainer.run.check()
        trainer.run.sync_records()
        save = partial(trainer.trainee.save_final, trainer.plain_model, tokenizer=trainer.tokenizer, weights=weights)
        model_type = write_final(trainer.run.final_dir, save)
        write_losses(trainer.run)
        with trainer.recorder.failures.tolerated("plots"):
            write_plots(trainer.run.path)
        validation = {
            name: value for name, value in found.items() if name.startswith("val/")
        }  # benchmarks have a part of their own
        write_stats(trainer, _stats(trainer) | validation | {"model_type": model_type})
    wait_for_main(trainer.accelerator)


def push(trainer: Trainer) -> None:
    """Uploads the finished run where the recipe says so; what fails there is told, and the run has ended well."""
    hub = trainer.recipe.hub
    if not hub.push or not trainer.accelerator.is_main_process:
        return
    from gpt2x.publishing.hub import Push, push_run

    assert hub.repo_id is not None
    with trainer.recorder.failures.tolerated("push"):
        url = push_run(trainer.run.path, Push(repo_id=hub.repo_id, is_public=hub.public, license=hub.license))
        trainer.accelerator.print(f"published:      {url}")


def write_losses(run: RunDirectory) -> None:
    """losses.npy: the recorded training losses in order."""
    _, losses = column(read_metrics(run.path), "train/loss")
    content = io.BytesIO()
    np.save(content, losses)
    write_file(run.losses_file, content.getvalue())


def write_stats(trainer: Trainer, stats: dict[str, Any]) -> None:
    """stats.json, with the evaluations that were recorded of these weights before final/ was made again."""
    evaluation = recorded_results(trainer.run.stats_file)
    for evaluator in trainer.evaluators:
        evaluation |= evaluator.results()
    if evaluation:
        stats["evaluation"] = evaluation
    trainer.run.check()
    write_file(trainer.run.stats_file, (json.dumps(stats, indent=2) + "\n").encode())


def _stats(trainer: Trainer) -> dict[str, Any]:
    progress = trainer.progress
    total, _ = num_parameters(trainer.plain_model)
    flops = flops_per_token(trainer.plain_model, trainer.recipe.data.sequence_length)
    return {
        "finished": True,
        "steps": progress.step,
        "tokens": progress.tokens,
        "elapsed_s": progress.elapsed_s,
        "tokens_per_s": progress.tokens / progress.elapsed_s,
        "parameters": total,
        "flops": flops * progress.tokens,
        "devices": describe_device(trainer.accelerator),
        "data": trainer.batches.batches.accounts(progress.step),
        "data_fingerprints": {name: source.fingerprint for name, source in trainer.batches.batches.sources.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
