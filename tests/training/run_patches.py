"""What tests change in a forked run before its script starts."""

import os

import torch


def poison_rank_one():
    """The loss of rank 1 is not a number in the third step."""
    poison(calls_until=3, is_here=os.environ.get("RANK") == "1")


def poison_every_step():
    """No loss is a number."""
    poison(calls_until=0, is_here=True)


def poison(*, calls_until, is_here):
    from gpt2x.training import steps

    original, calls = steps.accumulate_losses, []

    def poisoned(accelerator, model, micro_batches):
        calls.append(None)
        if is_here and len(calls) >= calls_until:
            weight = next(model.parameters())
            with torch.no_grad():
                kept = weight.clone()
                weight.fill_(torch.nan)
            losses = original(accelerator, model, micro_batches)
            with torch.no_grad():
                weight.copy_(kept)
            return losses
        return original(accelerator, model, micro_batches)

    steps.accumulate_losses = poisoned


def mask_rank_one():
    """Rank 1 has no token to predict in the third step."""
    from gpt2x.training import steps

    original, calls = steps.accumulate_losses, []

    def masked(accelerator, model, micro_batches):
        calls.append(None)
        if os.environ.get("RANK") == "1" and len(calls) == 3:
            micro_batches = [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in micro_batches]
        return original(accelerator, model, micro_batches)

    steps.accumulate_losses = masked


def limit_files():
    """After the first checkpoint no file grows beyond some kilobytes, as on a full disk."""
    import resource

    from gpt2x.checkpoints import saver as saving

    original = saving.prune

    def limiting(run_dir, trainer, rules):
        original(run_dir, trainer, rules)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    saving.prune = limiting


def fill_the_disk():
    """After the first checkpoint another program fills the file system of the run."""
    from gpt2x.checkpoints import saver as saving

    original = saving.prune

    def filling(run_dir, trainer, rules):
        original(run_dir, trainer, rules)
        with open(run_dir.parents[1] / "filler", "ab", buffering=0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError:
                filler.truncate(filler.tell() - 60_000)

    saving.prune = filling
