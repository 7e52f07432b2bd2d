"""What scripts/pretrain.py runs, and what every training run has: its sections, budget, batch and optimizer."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from gpt2x.config.checks import Count, Range, Share, ShareBelowOne, Size, Workers, check_numbers, shown
from gpt2x.config.data import DataSection
from gpt2x.config.model import ModelSection

# Beside which file systems that allow 255 have room for what is appended to names.
MAX_NAME = 200
BUDGETS = ("max_steps", "max_tokens", "max_time_s", "num_train_epochs")


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """The run and where it writes."""

    name: str | None = None
    """Name of the run's directory; by default the recipe's file name."""
    dir: Path = Path("runs")
    """Directory of all runs."""
    seed: Annotated[int, Range(least=0, most=2**32 - 1)] = 1337
    """Seed of the initial weights, of the data order and of dropout."""
    report_to: list[str] = field(default_factory=list)
    """Trackers of accelerate to report to: tensorboard, wandb, trackio, ..."""

    def __post_init__(self) -> None:
        check_numbers(self, "run.")
        if self.name is None:
            return
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.name) or self.name in (".", ".."):
            raise ValueError(
                f"run.name ({shown(self.name)}) must be a name of letters, digits, '.', '_' and '-', without folders; "
                f"folders are set by run.dir."
            )
        if len(self.name) > MAX_NAME:
            raise ValueError(
                f"run.name ({shown(self.name)}) has {len(self.name)} characters, and {MAX_NAME} at most; shorten it."
            )


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The budget, the batch, the precision, and what happens at which intervals."""

    max_steps: Count | None = None
    """Budget in optimizer steps. Exactly one of the four budgets is given."""
    max_tokens: Count | None = None
    """Budget in tokens."""
    max_time_s: Annotated[float, Range(above=0, most=10**9)] | None = None
    """Budget in seconds of training: compilation and waiting for data count, validation, samples, saving and a machine
    that sleeps do not."""
    num_train_epochs: Annotated[float, Range(above=0, most=10**6)] | None = None
    """Budget in passes over all sequences of the sources, the last step made whole; not for streams. Of a mixture with
    weights, as many sequences as that. Like max_tokens it is counted in steps of the present size."""
    tokens_per_step: Annotated[int, Range(least=1, most=10**10)] = 524_288
    """Batch size in tokens per optimizer step; accumulation follows from it."""
    micro_batch_size: Size = 16
    """Sequences per device and forward pass."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    """Precision of the matrix products; weights and optimizer state are float32. fp16 needs a GPU."""
    torch_compile: bool = False
    """Whether the model is compiled by torch.compile."""
    gradient_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass, to save memory."""
    max_grad_norm: Annotated[float, Range(above=0, most=10**9)] | None = 1.0
    """Gradients are clipped to this norm; null for no clipping."""
    num_threads: Workers | None = None
    """CPU threads per process; by default the usable cores shared among the node's processes."""
    logging_steps: Count = 1
    """Steps between two records of metrics.jsonl."""
    save_steps: Count | None = None
    """Steps between two checkpoints; null to save at the end only."""
    save_total_limit: Count | None = 2
    """How many checkpoints are kept, the newest; null for all."""
    keep_steps: Count | None = None
    """Checkpoints at multiples of this many steps are kept for ever; a multiple of save_steps."""
    save_best: bool = False
    """Whether every validation that is the best so far is followed by a checkpoint, of which the last is kept."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What happens where a loss or gradient is not finite: the run stops, or the step leaves the weights alone."""
    max_skipped_steps: Count = 5
    """With on_non_finite skip, how many such steps in a row are tolerated."""

    def __post_init__(self) -> None:
        check_numbers(self, "train.")
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"{', '.join(given)} are given, set the others to null" if given else "none is given"
            rule = f"exactly one budget of {', '.join(f'train.{name}' for name in BUDGETS)} is needed"
            raise ValueError(f"{rule}; {found}.")
        if self.keep_steps is not None and (self.save_steps is None or self.keep_steps % self.save_steps):
            raise ValueError(
                f"train.keep_steps ({self.keep_steps}) must be a multiple of train.save_steps "
                f"({shown(self.save_steps)}), at which checkpoints are made."
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything (arXiv:1711.05101), or Muon for the matrices of the layers and AdamW for the rest."""
    learning_rate: Annotated[float, Range(above=0, most=1000)] = 6e-4
    """AdamW's peak learning rate."""
    muon_learning_rate: Annotated[float, Range(above=0, most=1000)] = 0.02
    """Muon's peak learning rate."""
    muon_momentum: ShareBelowOne = 0.95
    """Muon's Nesterov momentum."""
    weight_decay: Annotated[float, Range(least=0, most=1000)] = 0.1
    """Decoupled weight decay of the matrices; norms, biases and embeddings are not decayed by Muon's AdamW."""
    adam_beta1: ShareBelowOne = 0.9
    """AdamW's decay of the gradient's mean."""
    adam_beta2: ShareBelowOne = 0.95
    """AdamW's decay of the squared gradient's mean."""
    adam_epsilon: Annotated[float, Range(above=0, most=1_000_000)] = 1e-8
    """AdamW's epsilon."""
    lr_scheduler_type: Literal["cosine", "linear", "wsd"] = "cosine"
    """Decay after warmup: cosine, linear, or warmup-stable-decay (arXiv:2405.18392)."""
    warmup_steps: Annotated[float, Range(least=0, most=10**15)] = 0
    """Steps of linear warmup; a number below 1 is a share of a step or token budget."""
    decay_ratio: Share = 0.4
    """With wsd, the share of the budget at its end over which the rate falls linearly."""
    min_lr_ratio: Share = 0.1
    """The last learning rate, as a share of the peak."""

    def __post_init__(self) -> None:
        check_numbers(self, "optimizer.")


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """Validation loss and samples during the run."""

    eval_steps: Count | None = 1000
    """Steps between two validations; null for the end only."""
    batch_size: Size = 16
    """Sequences per device and forward pass of the validation."""
    sample_steps: Count | None = None
    """Steps between two sets of samples; null for the end only."""
    prompts: list[str] = field(default_factory=list)
    """Prompts that are continued in every set of samples."""
    num_validation_prompts: Annotated[int, Range(least=0, most=10**6)] = 2
    """How many beginnings of validation documents are continued beside them."""
    max_new_tokens: Size = 100
    """Length of a sample in tokens."""
    hellaswag: str | None = None
    """Scores the model on HellaSwag beside every validation: a .jsonl file, or hub; null for not."""
    hellaswag_items: Size = 1000
    """How many of its items, always the same ones."""

    def __post_init__(self) -> None:
        check_numbers(self, "evaluation.")


@dataclass(frozen=True, kw_only=True)
class HubSection:
    """The upload of a finished run: model, card and plots in one commit, as the user of HF_TOKEN or `hf auth login`.

    A push that fails is told in one line with the command that tries again; the run has ended well all the same.
    """

    push: bool = False
    """Whether the run is uploaded when it is finished."""
    repo_id: str | None = None
    """The repository, USER/NAME; made where it is not there."""
    public: bool = False
    """Whether a new repository is visible to everyone."""
    license: str | None = None
    """The model's licence, an identifier that the Hub knows; needed where it is public, else it may be left open."""

    def __post_init__(self) -> None:
        if self.push and self.repo_id is None:
            raise ValueError("hub.push needs hub.repo_id: USER/NAME.")
        if self.push and self.public and self.license is None:
            raise ValueError(
                "hub.public needs hub.license, an identifier that the Hub knows: mit, apache-2.0, other ..."
            )


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """What every run has, whatever it starts from."""

    run: RunSection = field(default_factory=RunSection)
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    hub: HubSection = field(default_factory=HubSection)
    init_from: str | None = None
    """Directory or Hub id of a stock or gpt2x model, or a run, to go on from."""
    resume: bool = False
    """Go on with an existing run although its recipe has changed."""

    def __post_init__(self) -> None:
        if self.train.num_train_epochs is not None and any(source.stream for source in self.data.mixture):
            raise ValueError(
                "train.num_train_epochs needs sources of known length, and a stream has none; set train.max_steps or "
                "train.max_tokens instead."
            )
        if self.train.max_time_s is not None and 0 < self.optimizer.warmup_steps < 1:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be a number of steps with "
                f"train.max_time_s, whose clock also runs while the model is compiled; 20 is usual."
            )


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainingRecipe):
    """A pretraining run: what scripts/pretrain.py runs."""

    model: ModelSection = field(default_factory=ModelSection)
    init_from: str | None = None
    """Directory or Hub id of a stock or gpt2x model, or a run, to go on from instead of random weights; its shape
    replaces that of model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        length, limit = self.data.sequence_length, self.model.max_position_embeddings
        if self.init_from is None and length > limit:
            raise ValueError(
                f"data.sequence_length ({length}) must not exceed model.max_position_embeddings ({limit}); "
                f"shorten the one or raise the other."
            )


def accumulation_steps(
    tokens_per_step: int, *, micro_batch_size: int, sequence_length: int, num_processes: int
) -> int:
    """Micro-batches per process and optimizer step.

    Raises:
        ValueError: where tokens_per_step is no multiple of what one pass over all processes reads.
    """
    tokens_per_pass = micro_batch_size * sequence_length * num_processes
    if tokens_per_step % tokens_per_pass:
        below = max(tokens_per_step // tokens_per_pass, 1) * tokens_per_pass
        raise ValueError(
            f"train.tokens_per_step ({tokens_per_step}) must be a multiple of micro_batch_size x sequence_length x "
            f"data-parallel processes = {micro_batch_size} x {sequence_length} x {num_processes} = {tokens_per_pass}; "
            f"set it to {below} or change micro_batch_size."
        )
    return tokens_per_step // tokens_per_pass
