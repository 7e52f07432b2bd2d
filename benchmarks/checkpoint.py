"""What a checkpoint costs the training loop: gpt2x against torch.save, GPT-2 124M with AdamW's state, 1.5 GB.

`python scripts/benchmark.py checkpoint [--saves 4] [--steps_between 8] [--rows 1] [--length 128] [--rounds 3]
[--directory DIR]`

Each contestant trains the same model and saves every few steps; after the warm-up, in which optimizer state and copies
get their memory, it is timed. `blocked_s` is how long the loop stands still for a save: in the call, and before the
next update, for which gpt2x's copy must be done. gpt2x trains on until a save is written before it makes the next one,
which would wait for it. `overhead_s` is all that a save costs: the time of the whole stretch beyond that of as many
steps without a save, per save; on a CPU the thread that writes also takes cores from the steps.

The peer is torch.save of model and optimizer to one file, as nanoGPT does it, without fsync, digest or a second copy
of the old file. gpt2x writes the stock model, the optimizer's state and the manifest of their sha256, flushes all of
it to the disk, renames it and deletes the checkpoint before the last. `torch-save-safe` is torch.save with the flush
and the rename.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from benchmarks.contest import interleave, print_table
from gpt2x.checkpoints.saver import CheckpointSaver
from gpt2x.checkpoints.state import State, optimizer_tensors, parameter_names
from gpt2x.config import TrainSection
from gpt2x.distributed.devices import keep_freed_memory
from gpt2x.distributed.launch import usable_cores
from gpt2x.runs.directory import RunDirectory
from gpt2x.stock_forms import save_stock
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

CONTESTANTS = ("torch-save", "torch-save-safe", "gpt2x")
WARMUP_STEPS = 3

Save = Callable[[int], None]


def own_save(model: GPT2XForCausalLM, optimizer: AdamW, directory: Path) -> tuple[Save, CheckpointSaver]:
    """gpt2x's way to save, and what does it."""
    saver = CheckpointSaver(
        RunDirectory(directory),
        lambda target, weights: save_stock(model, target, state_dict=weights),
        rules=TrainSection(max_steps=1, save_total_limit=1),
    )
    names = parameter_names(model)

    def state(step: int) -> State:
        tensors = optimizer_tensors([optimizer], names)
        return State(model=model.state_dict().items(), optimizer=tensors.items(), trainer={"step": step})

    saver.reserve(state(0))

    def save(step: int) -> None:
        saver.confirm(step, best_step=None)
        saver.save(state(step))

    return save, saver


def peer_save(model: PreTrainedModel, optimizer: AdamW, directory: Path, *, is_safe: bool) -> Save:
    """torch.save into one file, in place or by way of a second one that is flushed."""
    file = directory / "checkpoint.pt"

    def save(step: int) -> None:
        target = file.with_suffix(".tmp") if is_safe else file
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, target)
        if is_safe:
            with target.open("rb") as written:
                os.fsync(written.fileno())
            target.replace(file)

    return save


def measure(contestant: str, directory: Path, *, saves: int, steps_between: int, shape: tuple[int, int]) -> dict:
    """The seconds of a save of one contestant in this process."""
    torch.manual_seed(0)
    if not torch.accelerator.is_available():
        torch.set_num_threads(usable_cores())
        keep_freed_memory()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = GPT2XForCausalLM(GPT2XConfig()).to(device)
    optimizer = AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, model.config.vocab_size, shape, device=device)
    step_s = [_step(model, optimizer, ids)[0] for _ in range(WARMUP_STEPS + steps_between)]
    saver = None
    if contestant == "gpt2x":
        save, saver = own_save(model, optimizer, directory)
    else:
        save = peer_save(model, optimizer, directory, is_safe=contestant == "torch-save-safe")
    save(0)
    _finish(saver)

    blocked, num_steps, started = [], 0, time.perf_counter()
    for number in range(1, saves + 1):
        began = time.perf_counter()
        save(number)
        blocked.append(time.perf_counter() - began)
        stretch = 0
        while stretch < steps_between or (saver is not None and saver.is_busy):
            blocked[-1] += _step(model, optimizer, ids, saver)[1]
            stretch += 1
        num_steps += stretch
    _finish(saver)
    whole = time.perf_counter() - started
    plain = statistics.median(step_s[WARMUP_STEPS:]) * num_steps
    return {"blocked_s": statistics.median(blocked), "overhead_s": (whole - plain) / saves}


def _finish(saver: CheckpointSaver | None) -> None:
    if saver is not None:
        saver.wait()


def _step(
    model: nn.Module, optimizer: AdamW, ids: torch.Tensor, saver: CheckpointSaver | None = None
) -> tuple[float, float]:
    """The seconds of a step, and those of them that it waited for a copy."""
    started = time.perf_counter()
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False, return_logits=False).loss
    loss.backward()
    loss.item()
    began = time.perf_counter()
    if saver is not None:
        saver.wait_for_copy()
    waited = time.perf_counter() - began
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started, waited


def main(argv: list[str]) -> None:
    """Measures one contestant where it is named, else all of them by turns."""
    parser = argparse.ArgumentParser(prog="benchmark.py checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("contestant", nargs="?", choices=CONTESTANTS)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--steps_between", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    options = parser.parse_args(argv)
    names = ("saves", "steps_between", "rows", "length", "directory")
    if options.contestant is None:
        arguments = [f"--{name}={getattr(options, name)}" for name in names]
        print_table(interleave("checkpoint", CONTESTANTS, arguments, rounds=options.rounds), against=CONTESTANTS[0])
        return
    directory = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        shape, steps_between = (options.rows, options.length), options.steps_between
        found = measure(options.contestant, directory, saves=options.saves, steps_between=steps_between, shape=shape)
        print(json.dumps(found))
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main(sys.argv[1:])
