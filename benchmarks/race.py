"""The race: bits per byte that a budget of seconds buys on the embedded corpus, gpt2x against nanoGPT.

`python scripts/benchmark.py race [--seconds 75] [--peer_seconds 300] [--peer_layers 4] [--peer_width 256]`

The clock runs from the first step's start with compilation inside, validation and saving outside. Both read the same
token shards and are validated by the same function. gpt2x runs configuration/pretrain/quickstart.yaml, in a fresh
process with an empty compiler cache. The peer is nanoGPT's model and optimizer (github.com/karpathy/nanoGPT) in our
words at the best settings found: bf16 autocast, compiled, fused AdamW, a tuned rate, warmup and cosine by the clock,
windows at random offsets.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from gpt2x.batches.validation import HeldOut, ValidationBatches
from gpt2x.command_line import parse_recipe
from gpt2x.config import PreparationRecipe
from gpt2x.distributed.launch import usable_cores
from gpt2x.evaluation.validation import validate
from gpt2x.preparation.prepare import prepare
from gpt2x.shards.index import INDEX_FILE, Index, load_index

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "configuration" / "data" / "python-stdlib.yaml"
BLOCK, BATCH = 256, 16


class Peer(nn.Module):
    """nanoGPT: learned positions, LayerNorm without bias, GELU, tied head, no dropout."""

    def __init__(self, vocab_size: int, *, layers: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(BLOCK, width)
        self.layers = nn.ModuleList(PeerLayer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_residual = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if into_residual else 0.02)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(self.norm(x)))


class PeerLayer(nn.Module):
    """nanoGPT's block: attention and MLP, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = max(width // 64, 1)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.project = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


def train_peer(index: Index, *, seconds: float, layers: int, width: int, rate: float) -> dict[str, float]:
    """Trains the peer for a budget and validates it."""
    torch.manual_seed(1337)
    torch.set_num_threads(usable_cores())
    model = Peer(index.vocab_size, layers=layers, width=width)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), fused=True)
    compiled = torch.compile(model, dynamic=False)
    stream = np.concatenate([shard.tokens for shard in index.open_split("train")])
    steps, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        factor = min((steps + 1) / 50, 0.1 + 0.45 * (1 + math.cos(math.pi * elapsed / seconds)))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        offsets = torch.randint(len(stream) - BLOCK - 1, (BATCH,)).tolist()
        windows = torch.from_numpy(np.stack([stream[at : at + BLOCK + 1] for at in offsets]).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            logits = compiled(windows[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    batches = ValidationBatches(HeldOut.of(index), sequence_length=BLOCK, batch_size=BATCH)
    validation = validate(model, batches, num_bytes=batches.num_bytes, accelerator=Accelerator(cpu=True))
    assert validation is not None
    return {"bits_per_byte": validation.bits_per_byte, "tokens": steps * BATCH * BLOCK, "seconds": elapsed}


def train_gpt2x(scratch: Path, *, seconds: float, overrides: list[str]) -> dict[str, float]:
    """Runs the quickstart for a budget through its own script."""
    command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), f"--train.max_time_s={seconds}"]
    command += [f"--run.dir={scratch}", "--run.name=race", *overrides]
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
    stats = json.loads((scratch / "race" / "stats.json").read_text(encoding="utf-8"))
    return {
        "bits_per_byte": stats["val/bits_per_byte"],
        "tokens": stats["tokens"],
        "seconds": stats["elapsed_s"],
    }


def main(argv: list[str]) -> None:
    """Runs peer and gpt2x one after the other and prints both results; options not its own go to pretrain.py."""
    parser = argparse.ArgumentParser(prog="benchmark.py race", description=__doc__)
    parser.add_argument("--seconds", type=float, default=75)
    parser.add_argument("--peer_seconds", type=float, default=300)
    parser.add_argument("--peer_layers", type=int, default=4)
    parser.add_argument("--peer_width", type=int, default=256)
    parser.add_argument("--peer_rate", type=float, default=3e-3)
    options, overrides = parser.parse_known_args(argv)
    os.chdir(ROOT)
    recipe, _ = parse_recipe(PreparationRecipe, [], script="race", default_config=CORPUS)
    if not (recipe.output_dir / INDEX_FILE).exists():
        prepare(recipe)
    index = load_index(recipe.output_dir)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{scratch}/compiled"
        results = {}
        if options.peer_seconds:
            shape = {"layers": options.peer_layers, "width": options.peer_width, "rate": options.peer_rate}
            results["nanoGPT"] = train_peer(index, seconds=options.peer_seconds, **shape)
        if options.seconds:
            results["gpt2x"] = train_gpt2x(Path(scratch), seconds=options.seconds, overrides=overrides)
    for name, result in results.items():
        print(f"{name:8s} " + "  ".join(f"{key} {value:,.4f}" for key, value in result.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
