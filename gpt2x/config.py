"""The configuration of everything that gpt2x runs: typed, documented, validated.

A recipe is YAML whose sections are the dataclasses below; any field can be overridden on the command line
(``--train.max_steps 100``), and a section may be the path of another YAML file, relative to the recipe that names it
(``model: ../model/gpt2.yaml``). Neither torch nor transformers is imported here, so that ``--help`` and every
complaint about a recipe are instant.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The architecture: the fields of GPT2XConfig, whose defaults are GPT-2 124M."""

    vocab_size: int | None = None
    """Number of token ids; by default the tokenizer's."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_hidden_layers: int = 12
    """Number of transformer layers."""
    num_attention_heads: int = 12
    """Number of query heads."""
    num_key_value_heads: int | None = None
    """Number of key and value heads (GQA, arXiv:2305.13245); by default as many as query heads."""
    head_dim: int | None = None
    """Width of one head; by default hidden_size / num_attention_heads."""
    intermediate_size: int | None = None
    """Width inside the MLP; by default 4 * hidden_size."""
    max_position_embeddings: int = 1024
    """Longest sequence the model takes, in tokens."""
    hidden_act: str = "gelu_new"
    """Activation of the MLP, a name of transformers' ACT2FN: gelu_new, silu, relu2, ..."""
    gated_mlp: bool = False
    """Whether the MLP is gated (SwiGLU with silu, arXiv:2002.05202)."""
    position_embedding: Literal["learned", "rope"] = "learned"
    """How positions enter: GPT-2's learned table, or rotary embeddings (arXiv:2104.09864)."""
    rope_parameters: dict[str, Any] | None = None
    """RoPE's rope_theta, rope_type and their scaling parameters; only with position_embedding: rope."""
    norm: Literal["layer_norm", "rms_norm", "rms_norm_weightless"] = "layer_norm"
    """Normalization: LayerNorm, RMSNorm (arXiv:1910.07467), or RMSNorm without a weight."""
    norm_eps: float = 1e-5
    """Epsilon of every normalization."""
    qk_norm: Literal["none", "weight", "weightless"] = "none"
    """RMSNorm of queries and keys per head (arXiv:2010.04245)."""
    embedding_norm: bool = False
    """Whether the embeddings are normalized before the first layer."""
    attention_bias: bool = True
    """Whether the attention projections have biases."""
    mlp_bias: bool = True
    """Whether the MLP's projections have biases."""
    final_logit_softcapping: float | None = None
    """Logits are capped to c * tanh(logits / c) (arXiv:2408.00118); null for no cap."""
    tie_word_embeddings: bool = True
    """Whether the head shares its weight with the token embedding."""
    layer_types: list[str] | None = None
    """Per layer full_attention or sliding_attention; null for full attention everywhere."""
    sliding_window: int | None = None
    """How many tokens a sliding layer sees."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    residual_init: Literal["scaled", "zero"] = "scaled"
    """Projections back into the residual stream start at GPT-2's 1/sqrt(2 * layers) of that, or at zero."""
    attention_dropout: float = 0.0
    """Dropout of the attention weights."""
    hidden_dropout: float = 0.0
    """Dropout of what each sublayer adds to the residual stream."""
    embedding_dropout: float = 0.0
    """Dropout of the embeddings."""


@dataclass(frozen=True, kw_only=True)
class CorpusSection:
    """Where documents come from, and how they are split."""

    kind: Literal["python_stdlib", "files"] = "python_stdlib"
    """The sources of this interpreter's standard library without its tests, or files of one's own."""
    paths: list[str] = field(default_factory=list)
    """For kind files: files or glob patterns; a .txt is one document, a .jsonl one per line."""
    text_column: str = "text"
    """The field of a .jsonl line that holds the text."""
    validation_fraction: float = 0.05
    """Share of the documents, chosen by the hash of their text, that is held out."""
    split_seed: int = 0
    """Another seed holds out other documents."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction ({self.validation_fraction}) must be at least 0 and below 1; 0.05 is usual."
            )
        if (self.kind == "files") != bool(self.paths):
            raise ValueError(
                f"corpus.paths ({self.paths}) belongs to kind: files, and is needed there; kind is {self.kind}."
            )


@dataclass(frozen=True, kw_only=True)
class TokenizerSection:
    """Which tokenizer reads the corpus; trained on its training documents where vocab_size is given."""

    path: str
    """Directory (or Hub id) of a transformers tokenizer; a trained one is saved there."""
    vocab_size: int | None = None
    """Size of the byte-level BPE to train, special tokens included; null to use the tokenizer at path as it is."""
    eos_token: str = "<|endoftext|>"
    """The token that ends every document, of a tokenizer trained here."""

    def __post_init__(self) -> None:
        if self.vocab_size is not None and self.vocab_size < 257:
            raise ValueError(
                f"tokenizer.vocab_size ({self.vocab_size}) must be at least 257: 256 bytes and the end of text."
            )


@dataclass(frozen=True, kw_only=True)
class PreparationRecipe:
    """Text to token shards: what scripts/prepare_data.py runs."""

    output_dir: Path
    """Directory of the token shards and their index."""
    corpus: CorpusSection = field(default_factory=CorpusSection)
    tokenizer: TokenizerSection
    tokens_per_shard: int = 100_000_000
    """Tokens per shard file at most, about 200 MB; documents stay whole."""

    def __post_init__(self) -> None:
        _check_positive("", tokens_per_shard=self.tokens_per_shard)


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """What scripts/train_tokenizer.py runs."""

    corpus: CorpusSection = field(default_factory=CorpusSection)
    tokenizer: TokenizerSection


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """The run and where it writes."""

    name: str | None = None
    """Name of the run's directory; by default the recipe's file name."""
    dir: Path = Path("runs")
    """Directory of all runs."""
    seed: int = 1337
    """Seed of the initial weights, of the data order and of dropout."""
    report_to: list[str] = field(default_factory=list)
    """Trackers of accelerate to report to: tensorboard, wandb, trackio, ..."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"run.seed ({self.seed}) must be at least 0 and below 2**32, as numpy wants it.")
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9._-]+", self.name):
            raise ValueError(
                f"run.name ({self.name!r}) must be one path component of letters, digits, '.', '_' and '-'."
            )


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The token shards to train on."""

    path: Path | None = None
    """Directory of token shards; by default the preparation's output_dir."""
    preparation: PreparationRecipe | None = None
    """How to make the shards when they are not there: a recipe of scripts/prepare_data.py."""
    sequence_length: int = 1024
    """Tokens per sequence."""

    def __post_init__(self) -> None:
        _check_positive("data.", sequence_length=self.sequence_length)
        if self.path is None and self.preparation is None:
            raise ValueError("data.path is needed: a directory of token shards as scripts/prepare_data.py makes them.")

    @property
    def shards_dir(self) -> Path:
        """The directory the shards are read from."""
        if self.path is not None:
            return self.path
        assert self.preparation is not None
        return self.preparation.output_dir


BUDGETS = ("max_steps", "max_tokens", "max_time_s")


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The budget, the batch, the precision, and what happens at which intervals."""

    max_steps: int | None = None
    """Budget in optimizer steps. Exactly one of the three budgets is given."""
    max_tokens: int | None = None
    """Budget in tokens."""
    max_time_s: float | None = None
    """Budget in seconds of training: compilation counts, validation, samples and saving do not."""
    tokens_per_step: int = 524_288
    """Batch size in tokens per optimizer step; accumulation follows from it."""
    micro_batch_size: int = 16
    """Sequences per device and forward pass."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    """Precision of the matrix products; weights and optimizer state are float32. fp16 needs a GPU."""
    torch_compile: bool = False
    """Whether the model is compiled by torch.compile."""
    gradient_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass, to save memory."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm; null for no clipping."""
    num_threads: int | None = None
    """CPU threads per process; by default the usable cores shared among the node's processes."""
    logging_steps: int = 1
    """Steps between two records of metrics.jsonl."""
    save_steps: int | None = None
    """Steps between two checkpoints; null to save at the end only."""
    save_total_limit: int | None = 2
    """How many checkpoints are kept; null for all."""

    def __post_init__(self) -> None:
        budgets = {name: getattr(self, name) for name in BUDGETS}
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) != 1:
            found = f"{', '.join(given)} are given, set the others to null" if given else "none is given"
            rule = "exactly one budget of train.max_steps, train.max_tokens and train.max_time_s is needed"
            raise ValueError(f"{rule}; {found}.")
        _check_positive("train.", **budgets, tokens_per_step=self.tokens_per_step, max_grad_norm=self.max_grad_norm)
        _check_positive("train.", micro_batch_size=self.micro_batch_size, num_threads=self.num_threads)
        _check_positive("train.", logging_steps=self.logging_steps, save_steps=self.save_steps)
        _check_positive("train.", save_total_limit=self.save_total_limit)


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything (arXiv:1711.05101), or Muon for the matrices of the layers and AdamW for the rest."""
    learning_rate: float = 6e-4
    """AdamW's peak learning rate."""
    muon_learning_rate: float = 0.02
    """Muon's peak learning rate."""
    muon_momentum: float = 0.95
    """Muon's Nesterov momentum."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices; norms, biases and embeddings are not decayed by Muon's AdamW."""
    adam_beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    adam_beta2: float = 0.95
    """AdamW's decay of the squared gradient's mean."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    lr_scheduler_type: Literal["cosine", "linear", "wsd"] = "cosine"
    """Decay after warmup: cosine, linear, or warmup-stable-decay (arXiv:2405.18392)."""
    warmup_steps: float = 0
    """Steps of linear warmup; a number below 1 is a share of a step or token budget."""
    decay_ratio: float = 0.4
    """With wsd, the share of the budget at its end over which the rate falls linearly."""
    min_lr_ratio: float = 0.1
    """The last learning rate, as a share of the peak."""

    def __post_init__(self) -> None:
        _check_positive("optimizer.", learning_rate=self.learning_rate, muon_learning_rate=self.muon_learning_rate)
        for name in ("muon_momentum", "adam_beta1", "adam_beta2", "decay_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer.{name} ({getattr(self, name)}) must lie between 0 and 1.")
        for name in ("weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} ({getattr(self, name)}) must not be negative; 0 turns it off.")


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """Validation loss and samples during the run."""

    eval_steps: int | None = 1000
    """Steps between two validations; null for the end only."""
    batch_size: int = 16
    """Sequences per device and forward pass of the validation."""
    sample_steps: int | None = None
    """Steps between two sets of samples; null for the end only."""
    prompts: list[str] = field(default_factory=list)
    """Prompts that are continued in every set of samples."""
    num_validation_prompts: int = 2
    """How many beginnings of validation documents are continued beside them."""
    max_new_tokens: int = 100
    """Length of a sample in tokens."""

    def __post_init__(self) -> None:
        _check_positive("evaluation.", eval_steps=self.eval_steps, batch_size=self.batch_size)
        _check_positive("evaluation.", sample_steps=self.sample_steps, max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A pretraining run: what scripts/pretrain.py runs."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    init_from: str | None = None
    """Directory or Hub id of a stock model to go on from, instead of random weights; its shape replaces model."""
    resume: bool = False
    """Go on with an existing run although its recipe has changed."""

    def __post_init__(self) -> None:
        length, limit = self.data.sequence_length, self.model.max_position_embeddings
        if self.init_from is None and length > limit:
            raise ValueError(
                f"data.sequence_length ({length}) must not exceed model.max_position_embeddings ({limit}); "
                f"shorten the one or raise the other."
            )
        if self.train.max_time_s is not None and 0 < self.optimizer.warmup_steps < 1:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be a number of steps with "
                f"train.max_time_s, whose clock also runs while the model is compiled; 20 is usual."
            )


@dataclass(frozen=True, kw_only=True)
class GenerationRecipe:
    """Continues text: what scripts/generate.py runs. Without a prompt it asks for one after another."""

    model: str = "runs/quickstart"
    """Directory or Hub id of a model, or the directory of a run."""
    prompt: str | None = None
    """The text to continue; null to ask for prompts until end of input."""
    max_new_tokens: int = 200
    """Length of a continuation in tokens; end of text ends it earlier."""
    temperature: float = 0.8
    """Flattens (above 1) or sharpens (below 1) the distribution; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens are drawn."""
    top_p: float | None = 0.95
    """Only the likeliest tokens that together have this probability are drawn (arXiv:1904.09751)."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already there become less likely (arXiv:1909.05858)."""
    seed: int = 1337
    """The same seed draws the same text."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and arithmetic."""

    def __post_init__(self) -> None:
        _check_positive("", max_new_tokens=self.max_new_tokens, top_k=self.top_k, top_p=self.top_p)
        _check_positive("", repetition_penalty=self.repetition_penalty)
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must not be negative; 0 takes the likeliest token.")


def _check_positive(prefix: str, **values: float | None) -> None:
    """Raises ValueError for the first value that is neither None nor above zero."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{prefix}{name} ({value}) must be positive.")


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


def to_yaml(recipe: Recipe | PreparationRecipe | TokenizerRecipe) -> str:
    """The recipe with every field written out, as YAML that parse_recipe reads back to the same recipe."""
    return yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
