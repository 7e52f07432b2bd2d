"""Correctness and speed on one GPU, a line a fact: `PYTHONPATH=. python tests/trials/gpu_check.py OUT`.

`--smoke` runs the same code on a CPU with small shapes, `--sections NAME ...` a part of it. Each section is tried on
its own; facts.json and profiles go to OUT, and the exit code is 1 where a section failed or a fact is not ok. pytest
collects nothing here, but tests/training/test_gpu_check.py runs the small shapes. Beside it: tests/trials/test_gpu.py.

No GPU was at hand so far: only the small shapes have run. What is expected of an H200 is predicted from counted bytes,
within 10%:

    versions        cuDNN above 9.15; plain, masked and decode choose cudnn ("flash": a system's cuDNN shadows it)
    head_and_loss   gradients within 1e-5 (float32) and 5e-3 (bfloat16, float16) of float64, present and fused
    model_step      124M, plain and packed: gradients within 1e-3 (float32), 6e-3 to 8e-3 (bfloat16, and compiled)
    copies          ok and pinned, though the GPU is busy; host memory grows by what is copied, within 5%
    evaluation      within 1e-5 of the CPU, without one synchronization per batch
    attention       queries, keys and values of autocast's dtype
    muon            48 matrices of 768 x 768 under 3 ms, the largest singular value below 1.25
    speed           present, 16 and 64 rows: 400k and 415k tokens/s; fused loss 490k and 520k; packed documents 10 to
                    30% below; modern with Muon 430k to 480k; 25 to 30 GiB at 64 rows
    host_time       3 to 8 ms in all after the step's synchronization
    generation      25 to 40 ms a token where cuDNN plans anew, then 6 to 10, as at the first call of gpt2x's own; with
                    a static cache 1 to 2
    shards          FSDP2 on one device: loss and gradient of one model without it, however many tokens are predicted

If the present speed is above 440k, the eager loss costs less than predicted: read profile_present_16.txt first.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gpt2x.checkpoints.saver import HostCopies
from gpt2x.config import OptimizerSection
from gpt2x.distributed.devices import compute_device, forked_rng, make_fsdp_plugin, on_device
from gpt2x.evaluation.continuations import Question, score_continuations
from gpt2x.evaluation.samples import generate
from gpt2x.evaluation.validation import validate
from gpt2x.training.optimizers import make_optimizers, orthogonalize
from gpt2x.training.start import compile_layers
from gpt2x.training.steps import MicroBatch, accumulate_losses, clip_gradients
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM, linear_gpt2x

SMALL = {"vocab_size": 503, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
MODERN = {
    "position_embedding": "rope",
    "norm": "rms_norm",
    "norm_eps": 1e-6,
    "hidden_act": "silu",
    "gated_mlp": True,
    "head_dim": 64,
    "attention_bias": False,
    "mlp_bias": False,
    "qk_norm": "weight",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "num_key_value_heads": 4,
    "intermediate_size": 2432,
}
# What does not go with SMALL.
SIZES_OF_768 = ("num_key_value_heads", "intermediate_size")
TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
# As much of an Accelerator as evaluation asks for.
ONE_PROCESS = {"num_processes": 1, "process_index": 0, "parallelism_config": None, "gather": lambda tensor: tensor}
ATTENTION = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}


@dataclass(kw_only=True)
class Check:
    """What is checked, where, and what was found.

    Attributes:
        out: where files go.
        is_smoke: whether small shapes run on the CPU.
        facts: what was found, by name.
    """

    out: Path
    is_smoke: bool
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def device(self) -> str:
        """The type of the device."""
        return "cpu" if self.is_smoke else "cuda"

    def say(self, name: str, **found: Any) -> None:
        """Prints what was found, and keeps it in facts.json, so that a run that is cut off leaves what it has."""
        self.facts[name] = found
        words = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
        )
        print(f"[{time.perf_counter() - self.started:5.0f} s] {name}: {', '.join(words)}", flush=True)
        (self.out / "facts.json").write_text(json.dumps(self.facts, default=str, indent=1) + "\n")

    def sync(self) -> None:
        """Waits for the device."""
        if not self.is_smoke:
            torch.cuda.synchronize()

    def model(self, options: Mapping[str, Any]) -> GPT2XForCausalLM:
        """GPT-2 124M, or a small one, with options; the same weights at every call."""
        torch.manual_seed(0)
        small = SMALL if self.is_smoke else {}
        kept = {name: value for name, value in options.items() if not self.is_smoke or name not in SIZES_OF_768}
        return GPT2XForCausalLM(GPT2XConfig(**{**small, **kept, "bos_token_id": 0, "eos_token_id": 0}))


def distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


# --- a loss that a compiler fuses, to compare with the present one ---------------------------------------------------


def where_loss(logits: Tensor, target: Tensor, softcap: float | None, needs_gradient: bool) -> Tensor:
    """What the present function says, without passes that scatter."""
    z = logits.float()
    capped = z if softcap is None else torch.tanh(z / softcap) * softcap
    lse = capped.logsumexp(-1, keepdim=True)
    loss = lse - capped.gather(1, target)
    if needs_gradient:
        gradient = torch.exp(capped - lse) - (torch.arange(z.shape[1], device=z.device) == target).float()
        gradient = gradient if softcap is None else gradient * (1 - (capped / softcap).square())
        logits.copy_(gradient * (linear_gpt2x.FLOAT16_STRETCH if logits.dtype == torch.float16 else 1.0))
    return loss


@contextmanager
def fused_loss(num_rows: int) -> Iterator[None]:
    """Puts where_loss, compiled, in the place of the present function, for so many rows at a time."""
    before = linear_gpt2x._cross_entropy_and_gradient_, linear_gpt2x._rows_per_chunk
    linear_gpt2x._cross_entropy_and_gradient_ = torch.compile(where_loss, dynamic=False, fullgraph=True)
    linear_gpt2x._rows_per_chunk = lambda num_tokens, _vocab_size: min(num_rows, num_tokens)
    try:
        yield
    finally:
        linear_gpt2x._cross_entropy_and_gradient_, linear_gpt2x._rows_per_chunk = before


# --- correctness -----------------------------------------------------------------------------------------------------


def versions(check: Check) -> None:
    """Which libraries, which GPU, and which attention torch chooses there."""
    found = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
    if not check.is_smoke:
        q = torch.randn(2, 12, 1024, 64, device="cuda", dtype=torch.bfloat16)
        mask = torch.ones(2, 1, 1024, 1024, device="cuda", dtype=torch.bool).tril()
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "cudnn": torch.backends.cudnn.version(),
            "plain": ATTENTION[torch._fused_sdp_choice(q, q, q, is_causal=True)],
            "masked": ATTENTION[torch._fused_sdp_choice(q, q, q, attn_mask=mask)],
            "decode": ATTENTION[torch._fused_sdp_choice(q[:, :, :1], q, q)],
        }
    check.say("versions", **found)


def head_and_loss(check: Check) -> None:
    """The gradients of head and loss, against torch's in float64."""
    num_tokens, vocab_size, width = (300, 503, 64) if check.is_smoke else (4096, 50257, 768)
    torch.manual_seed(0)
    hidden, weight = torch.randn(num_tokens, width), torch.randn(vocab_size, width) * 0.02
    labels = torch.randint(0, vocab_size, (num_tokens,))
    labels[::5] = -100
    exact = hidden.double().requires_grad_(), weight.double().requires_grad_()
    F.cross_entropy(exact[0] @ exact[1].T, labels).backward()
    for dtype, tolerance in {None: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}.items():
        for name, loss in (("present", nullcontext()), ("fused", fused_loss(2048))):
            own = [tensor.to(check.device, copy=True).requires_grad_() for tensor in (hidden, weight)]
            with loss, torch.autocast(check.device, dtype, enabled=dtype is not None):
                linear_gpt2x.chunked_linear_cross_entropy(*own, labels.to(check.device)).backward()
            off = [distance(tensor.grad, other.grad) for tensor, other in zip(own, exact)]
            check.say(f"loss {name} {dtype}", hidden=off[0], weight=off[1], ok=max(off) < tolerance)
    # rows of one token, whose sum is beyond float16 before it is divided by their number
    hidden, labels = torch.full((512, 64), 200.0), torch.zeros(512, dtype=torch.long)
    weight = torch.zeros(503, 64, dtype=torch.float16, device=check.device, requires_grad=True)
    loss = linear_gpt2x.chunked_linear_cross_entropy(hidden.half().to(check.device), weight, labels)
    loss.backward()
    off = float(weight.grad[0, 0]) / (-200 * 502 / 503) - 1
    check.say("loss of sums beyond float16", off=off, ok=abs(off) < 1e-3)


def one_step(model: nn.Module, device: str, dtype: torch.dtype | None, **inputs: Tensor) -> tuple[float, Tensor]:
    """(loss, all gradients in a row) of a model there."""
    model = model.to(device)
    with torch.autocast(device, dtype, enabled=dtype is not None):
        on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
        loss = model(**on_device, return_logits=False, use_cache=False).loss
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten().float().cpu() for parameter in model.parameters()])


def model_step(check: Check) -> None:
    """A whole step against float32 on the CPU; compiled where that matters most, since compiling takes long."""
    length = 64 if check.is_smoke else 512
    torch.manual_seed(1)
    ids, packed = torch.randint(0, 500, (2, length)), torch.arange(length).repeat(2, 1)
    packed[0, length // 3 :] -= length // 3
    packed[1, length // 2 :] -= length // 2
    for name, options in (("gpt2", {}), ("modern", MODERN)):
        for kind, positions in (("plain", {}), ("packed", {"position_ids": packed})):
            batch = {"input_ids": ids, "labels": ids, **positions}
            expected = one_step(check.model(options), "cpu", None, **batch)
            cases = [("float32", None, 1e-3), ("bf16", torch.bfloat16, 3e-2)]
            if (name, kind) in (("gpt2", "plain"), ("modern", "packed")):
                cases.append(("bf16 compiled", torch.bfloat16, 3e-2))
            for case, dtype, limit in cases:
                model = check.model(options)
                if "compiled" in case:
                    compile_layers(model)
                loss, gradient = one_step(model, check.device, dtype, **batch)
                off = abs(loss - expected[0]) / expected[0], distance(gradient, expected[1])
                is_ok = off[0] < limit / 3 and off[1] < limit * 3
                check.say(f"step {name} {kind} {case}", loss=off[0], gradient=off[1], ok=is_ok)


def copies(check: Check) -> None:
    """A copy for a checkpoint is of what stood there when it was taken, and takes as much memory as is announced."""
    count = 2**22 if check.is_smoke else 2**28
    tensors = [(str(number), torch.ones(count + 5, device=check.device)) for number in range(4)]
    host_copies, before = HostCopies(), resident_bytes()
    host_copies.reserve(tensors)
    grown = (resident_bytes() - before) / sum(tensor.nbytes for _, tensor in tensors)
    busy = torch.randn(*(2 * [256 if check.is_smoke else 8192]), device=check.device)
    for _ in range(20):  # the device is behind when it is asked
        busy = busy @ busy / busy.norm()
    tensors[0][1].fill_(3.0)
    taken = host_copies.take(tensors)
    for _, tensor in tensors:
        tensor.fill_(2.0)
    is_right = bool((taken["0"] == 3.0).all() and (taken["3"] == 1.0).all())
    pinned = taken["3"].is_pinned()
    # a process that has lived for long may have had some of it
    is_ok = is_right and (check.is_smoke or grown > 0.95) and grown < 1.05 and pinned == (not check.is_smoke)
    check.say("host copies", pinned=pinned, memory=grown, ok=is_ok)


def resident_bytes() -> int:
    """What this process holds of the machine's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def evaluation(check: Check) -> None:
    """Validation, continuations and batches there, against the CPU; and that no pass waits for the one before it."""
    ids = torch.randint(0, 500, (4, 64))
    batches = [{"input_ids": ids, "labels": ids}] * 4
    cut = [[part.tolist() for part in row.split([20, 11, 33])] for row in ids]
    questions = [Question(context=context, continuations=endings) for context, *endings in cut]
    found = []
    for device in ("cpu", check.device):
        accelerator = SimpleNamespace(**ONE_PROCESS, device=torch.device(device))
        model = check.model(MODERN).to(device)
        nats = validate(model, batches, num_bytes={"": 1}, accelerator=accelerator).loss
        scores = torch.cat([each.log_probs for each in score_continuations(model, questions, batch_size=2)])
        found.append(torch.cat([scores, torch.tensor([nats], dtype=torch.float64)]))
    off = distance(found[1], found[0])
    with synchronizing_raises(check):
        stops = [iter([False] * 2 + [True]) for _ in range(2)]
        options = {"num_bytes": {"": 1}, "accelerator": accelerator, "is_stopped": lambda: next(stops[0])}
        left = validate(model, batches, **options)
        left = left or score_continuations(model, questions, batch_size=1, is_stopped=lambda: next(stops[1]))
    check.say("evaluation", off=off, ok=off < 1e-5 and left is None)
    there = on_device(batches[0], torch.device(check.device))
    is_right = torch.equal(there["labels"].cpu(), ids) and there["labels"] is there["input_ids"]
    cpu = compute_device({"ACCELERATE_USE_CPU": "True"}).type
    check.say("batches", chosen=compute_device({}).type, asked_for=cpu, ok=is_right and cpu == "cpu")


@contextmanager
def synchronizing_raises(check: Check) -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    if check.is_smoke:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def attention(check: Check) -> None:
    """The dtypes that attention gets under autocast, and the random state after samples were drawn."""
    found = set()

    def attend(module: nn.Module, *tensors: Tensor, **options: Any) -> tuple[Tensor, None]:
        found.update(tensor.dtype for tensor in tensors[:3])
        return sdpa_attention_forward(module, *tensors, **options)

    AttentionInterface.register("dtypes", attend)
    model, device = check.model(MODERN).to(check.device), torch.device(check.device)
    model.set_attn_implementation("dtypes")
    ids = torch.randint(0, 500, (2, 64), device=device)
    for dtype in (torch.bfloat16, torch.float16):
        found.clear()
        with torch.autocast(check.device, dtype):
            model(ids, use_cache=False)
        check.say(f"attention {dtype}", dtypes=str(found), ok=found == {dtype})
    torch.manual_seed(7)
    expected = torch.rand(3, device=device)
    torch.manual_seed(7)
    with forked_rng(device):
        torch.manual_seed(8)
        torch.rand(5, device=device)
    check.say("random state", ok=torch.equal(torch.rand(3, device=device), expected))


def muon(check: Check) -> None:
    """The nearest orthogonal matrices, and what they cost."""
    count, width = (2, 128) if check.is_smoke else (48, 768)
    matrices = torch.randn(count, width, width, device=check.device)
    orthogonalize(matrices)
    check.sync()
    begun = time.perf_counter()
    found = orthogonalize(matrices)
    check.sync()
    milliseconds, singular = (time.perf_counter() - begun) * 1e3, torch.linalg.svdvals(found[0].float())
    largest = float(singular.max())
    check.say("newton-schulz", ms=milliseconds, smallest=float(singular.min()), largest=largest, ok=largest < 1.25)


def shards(check: Check) -> None:
    """FSDP2 on one device against a model without shards, with numbers of tokens that the precision cannot hold."""
    dist.init_process_group("gloo" if check.is_smoke else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard_step(check, "bf16", torch.bfloat16, torch.randint(0, 64, (4, 1024)))
        shard_step(check, "fp16", torch.float16, torch.randint(0, 64, (1100, 64) if check.is_smoke else (65, 1024)))
    finally:
        dist.destroy_process_group()


def shard_step(check: Check, precision: str, dtype: torch.dtype, ids: Tensor) -> None:
    """One step; the reference is of the precision as a whole, as layers on shards are, and has torch's own loss."""
    scale, ids_there = 2.0**16 if precision == "fp16" else 1.0, ids.to(check.device)
    reference, model = check.model(TINY).to(check.device, dtype), check.model(TINY).to(check.device)
    logits = reference(ids_there, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    expected = F.cross_entropy(logits, ids_there[:, 1:].flatten())
    (expected * scale).backward()
    policy, mesh = make_fsdp_plugin(precision).mixed_precision_policy, init_device_mesh(check.device, (1,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    accelerator = Accelerator(cpu=check.is_smoke, mixed_precision="bf16")  # does not reach a model it has not prepared
    accelerator.scaler = torch.amp.GradScaler(check.device, init_scale=scale, enabled=precision == "fp16")
    loss = accumulate_losses(accelerator, model, [{"input_ids": ids, "labels": ids}]).shares.sum()
    found = torch.cat([parameter.grad.full_tensor().flatten() for parameter in model.parameters()])
    gradient = torch.cat([parameter.grad.flatten() for parameter in reference.parameters()])
    off = abs(loss.item() / expected.item() - 1), distance(found, gradient)
    check.say(f"shards {precision}", loss=off[0], gradient=off[1], ok=off[0] < 1e-4 and off[1] < 1e-2)


# --- speed -----------------------------------------------------------------------------------------------------------


class Training:
    """A model in training, in bfloat16 with compiled layers, on the same rows in every micro-batch."""

    def __init__(
        self, check: Check, options: Mapping[str, Any], batch: MicroBatch, *, optimizer: str = "adamw"
    ) -> None:
        """Compiles nothing yet."""
        torch._dynamo.reset()
        self.check, self.batch = check, batch
        self.accelerator = Accelerator(cpu=check.is_smoke, mixed_precision="bf16")
        model = check.model(options)
        optimizers = make_optimizers(model, OptimizerSection(name=optimizer))
        compile_layers(model)
        self.model, *self.optimizers = self.accelerator.prepare(model, *optimizers)

    def backward(self, *, accumulation: int = 2) -> None:
        """The gradient of a step, clipped."""
        accumulate_losses(self.accelerator, self.model, [self.batch] * accumulation)
        clip_gradients(self.accelerator, self.model, 1.0)

    def step(self) -> None:
        """A whole step."""
        self.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def measure(self) -> dict[str, float]:
        """The median speed after a warm-up, and the most memory."""
        is_smoke, seconds = self.check.is_smoke, []
        for _ in range(1 if is_smoke else 3):
            self.step()
        if not is_smoke:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(1 if is_smoke else 8):
            self.check.sync()
            begun = time.perf_counter()
            self.step()
            self.check.sync()
            seconds.append(time.perf_counter() - begun)
        peak = 0.0 if is_smoke else torch.cuda.max_memory_allocated() / 2**30
        num_tokens = 2 * self.batch["input_ids"].numel()
        return {"ktokens_per_s": num_tokens / sorted(seconds)[len(seconds) // 2] / 1e3, "peak_gib": peak}


def batch_of(num_rows: int, length: int) -> dict[str, Tensor]:
    """Random rows."""
    ids = torch.randint(0, 500, (num_rows, length))
    return {"input_ids": ids, "labels": ids}


def speed(check: Check) -> None:
    """Training steps of 124M: the present loss and the fused one, packed documents, and the modern model with Muon."""
    length, many = (64, 2) if check.is_smoke else (1024, 64)
    for num_rows in (2,) if check.is_smoke else (16, 64):
        for name, loss in (("present", nullcontext()), ("fused", fused_loss(8192))):
            with loss:
                training = Training(check, {}, batch_of(num_rows, length))
                check.say(f"train gpt2 {name} loss, {num_rows} rows", **training.measure())
                if not check.is_smoke:
                    write_profile(training, check.out / f"profile_{name}_{num_rows}.txt")
                    del training
                    torch.cuda.empty_cache()
    packed = torch.arange(length).repeat(many, 1)
    packed[:, length // 3 :] -= length // 3
    with fused_loss(8192):
        training = Training(check, {}, batch_of(many, length) | {"position_ids": packed})
        check.say("train gpt2 fused loss, packed documents", **training.measure())
        training = Training(check, MODERN, batch_of(many, length), optimizer="muon")
        check.say("train modern muon fused loss", **training.measure())


def write_profile(training: Training, file: Path) -> None:
    """A table of what a step's time on the device goes to."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        training.step()
        training.check.sync()
    averages = profiled.key_averages()
    file.write_text(averages.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90))


def host_time(check: Check) -> None:
    """How long the device waits between the last kernel of a step and the first of the next."""
    training = Training(check, {}, batch_of(2, 64) if check.is_smoke else batch_of(16, 1024))
    training.measure()
    training.backward(accumulation=1)
    begun = time.perf_counter()
    for optimizer in training.optimizers:
        optimizer.step()
    stepped = time.perf_counter()
    for optimizer in training.optimizers:
        optimizer.zero_grad(set_to_none=True)
    cleared = time.perf_counter()
    check.say("host ms after the synchronization", optimizer=(stepped - begun) * 1e3, zero=(cleared - stepped) * 1e3)


def generation(check: Check) -> None:
    """Milliseconds a token of one row, with each cache, and without cuDNN's attention."""
    model = check.model({}).to(check.device, torch.bfloat16).eval()
    prompt = torch.randint(1, 500, (1, 16), device=check.device)
    static = {"cache_implementation": "static"}
    calls: dict[str, dict[str, str]] = {"first call": {}, "second call": {}}
    calls |= {} if check.is_smoke else {"static cache": static, "static cache again": static}
    for name, options in calls.items():
        check.say(f"generate, {name}", ms_per_token=generate_ms(check, model, prompt, **options))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        check.say("generate without cudnn", ms_per_token=generate_ms(check, model, prompt[:, :9]))
    # twice as far as before, to lengths that nobody has planned for
    milliseconds = generate_ms(check, model, prompt.repeat(1, 20), own=True)
    check.say("generate by gpt2x", ms_per_token=milliseconds, ok=check.is_smoke or milliseconds < 15)


def generate_ms(check: Check, model: GPT2XForCausalLM, prompt: Tensor, *, own: bool = False, **options: str) -> float:
    """Of each new token; as samples, chat and generate.py do it, or as transformers does alone."""
    count = 8 if check.is_smoke else 128
    counts = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    begun = time.perf_counter()
    if own:
        generate(model, prompt, **counts)
    else:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **counts, **options)
    check.sync()
    return (time.perf_counter() - begun) / count * 1e3


# --- all of it -------------------------------------------------------------------------------------------------------

# The order of what one wants to know first, should the machine go away.
SECTIONS: dict[str, Callable[[Check], None]] = {
    section.__name__: section
    for section in (
        *(versions, head_and_loss, model_step, copies, evaluation, attention, muon, shards),
        *(speed, host_time, generation),
    )
}


def main(arguments: Sequence[str]) -> int:
    """Runs the sections; the exit code."""
    parser = argparse.ArgumentParser(description="Correctness and speed on one GPU, a line a fact.")
    parser.add_argument("out", type=Path, help="where facts.json and profiles go")
    parser.add_argument("--smoke", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="all, if not given")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    check = Check(out=options.out, is_smoke=options.smoke)
    for name in options.sections:
        try:
            SECTIONS[name](check)
        except Exception:  # time on a GPU is short: what is wrong with one section must not cost the others
            check.say(f"{name} failed", error=traceback.format_exc()[-1500:], ok=False)
    wrong = [name for name, found in check.facts.items() if found.get("ok") is False]
    print(f"not ok: {', '.join(wrong)}" if wrong else "ok")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
