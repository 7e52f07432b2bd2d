"""A corpus of a few kilobytes, the recipe of a run of seconds on it, and the run itself in this process."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor

from gpt2x.checkpoints.format import newest_checkpoint
from gpt2x.checkpoints.progress import Progress
from gpt2x.config import (
    CorpusSection,
    DataSection,
    EvaluationSection,
    ModelSection,
    OptimizerSection,
    PreparationRecipe,
    Recipe,
    RunSection,
    TokenizerSection,
    TrainSection,
)
from gpt2x.distributed.devices import make_accelerator
from gpt2x.evaluation.validation import Validation
from gpt2x.preparation.prepare import prepare
from gpt2x.runs.directory import open_run_directory, write_config
from gpt2x.training.evaluators import HeldOutLoss, Metrics
from gpt2x.training.finish import finish
from gpt2x.training.loop import train
from gpt2x.training.signals import StopRequest
from gpt2x.training.start import make_trainer
from gpt2x.training.trainer import Trainer

WORDS = ["def", "return", "(", ")", ":", "\n", "    ", "self", "value", "=", "1", "for", "in", "été", "naïve", "if"]
CLOCK = ("elapsed_s", "tokens_per_s", "data/waited_s")
SECTIONS = ("run", "model", "data", "train", "optimizer", "evaluation")


def write_corpus(directory: Path, *, num_documents: int = 40) -> None:
    """Documents of random words of different lengths, always the same ones."""
    directory.mkdir(parents=True)
    generator = random.Random(0)
    for number in range(num_documents):
        text = " ".join(generator.choices(WORDS, k=generator.randint(40, 400)))
        (directory / f"{number:03d}.txt").write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def shards_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards, two of them for validation, and their tokenizer of 280 ids."""
    root = tmp_path_factory.mktemp("corpus")
    write_corpus(root / "texts")
    prepare(
        PreparationRecipe(
            output_dir=root / "shards",
            corpus=CorpusSection(kind="files", paths=[f"{root}/texts/*.txt"], validation_fraction=0.2),
            tokenizer=TokenizerSection(path=str(root / "tokenizer"), vocab_size=280),
            tokens_per_shard=4000,
        )
    )
    return root / "shards"


@pytest.fixture(scope="session")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of the same size, made by another tokenizer."""
    root = tmp_path_factory.mktemp("other")
    write_corpus(root / "texts")
    prepare(
        PreparationRecipe(
            output_dir=root / "shards",
            corpus=CorpusSection(kind="files", paths=[f"{root}/texts/*.txt"], validation_fraction=0.2),
            tokenizer=TokenizerSection(path=str(root / "tokenizer"), vocab_size=270),
        )
    )
    return root / "shards"


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one state per process, torch the number of threads; no test leaves them to the next."""
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(threads)


def tiny_recipe(runs_dir: Path, shards_dir: Path) -> Recipe:
    return Recipe(
        run=RunSection(name="tiny", dir=runs_dir),
        model=ModelSection(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32),
        data=DataSection(path=shards_dir, sequence_length=16),
        train=TrainSection(
            max_steps=20, tokens_per_step=128, micro_batch_size=8, mixed_precision="no", num_threads=1, save_steps=10
        ),
        optimizer=OptimizerSection(learning_rate=3e-3, warmup_steps=4),
        evaluation=EvaluationSection(eval_steps=10, num_validation_prompts=1, max_new_tokens=4),
    )


@pytest.fixture
def recipe(tmp_path: Path, shards_dir: Path) -> Recipe:
    """20 steps of 8 sequences of 16 tokens on a model of two layers, AdamW, float32."""
    return tiny_recipe(tmp_path / "runs", shards_dir)


Changer = Callable[..., Recipe]


@pytest.fixture
def changed() -> Changer:
    """``changed(recipe, train={"max_steps": 5}, resume=True)``: the recipe with these fields of these sections."""

    def change(recipe: Recipe, **changes: Any) -> Recipe:
        sections = {
            name: dataclasses.replace(getattr(recipe, name), **value) if name in SECTIONS else value
            for name, value in changes.items()
        }
        return dataclasses.replace(recipe, **sections)

    return change


class StopAfter(StopRequest):
    """A request to stop that comes while a step runs."""

    def __init__(self, progress: Progress, step: int) -> None:
        super().__init__()
        self.progress, self.step = progress, step

    @property
    def signal_number(self) -> int | None:  # type: ignore[override]
        return 2 if self.progress.step + 1 >= self.step else None

    @signal_number.setter
    def signal_number(self, _number: int | None) -> None:
        pass


@dataclasses.dataclass
class Run:
    """What became of a run."""

    job: Trainer
    found: Metrics | None

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.job.progress

    @property
    def validation(self) -> Validation | None:
        """The one at its end; None where it was stopped before."""
        (validation,) = [evaluator for evaluator in self.job.evaluators if isinstance(evaluator, HeldOutLoss)]
        return None if self.found is None else validation.latest

    @property
    def path(self) -> Path:
        """The run's directory."""
        return self.job.run.path

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl without what the clock says."""
        return read_records(self.path)

    def saved(self) -> dict[str, Tensor]:
        """Every tensor of the newest checkpoint: weights and optimizer state."""
        return read_tensors(self.path)


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


def read_tensors(run_dir: Path) -> dict[str, Tensor]:
    checkpoint, _ = newest_checkpoint(run_dir)
    assert checkpoint is not None
    files = [checkpoint / "model" / "model.safetensors", checkpoint / "state" / "optimizer.safetensors"]
    # clone: what is loaded is a map of the file, and some tests change the file
    return {f"{file.stem}/{name}": tensor.clone() for file in files for name, tensor in load_file(file).items()}


def start_job(recipe: Recipe) -> tuple[Trainer, Progress]:
    AcceleratorState._reset_state(reset_partial_state=True)
    run = open_run_directory(recipe, name="recipe")
    job = make_trainer(recipe, run, accelerator=make_accelerator(recipe, {}), stop=StopRequest())
    write_config(run, recipe)
    return job, job.progress


def run_recipe(recipe: Recipe, *, stop_after: int | None = None, finishes: bool = False) -> Run:
    job, progress = start_job(recipe)
    if stop_after is not None:
        job = dataclasses.replace(job, stop=StopAfter(progress, stop_after))
    with closing(job.batches.batches), job.recorder:  # not the threads that read ahead, which tests go on asking
        found = train(job)
    if found is not None and finishes:
        finish(job, found)
    return Run(job, found)


@pytest.fixture
def start() -> Callable[[Recipe], tuple[Trainer, Progress]]:
    """Makes the trainer of a recipe, as scripts/pretrain.py does."""
    return start_job


@pytest.fixture
def pretrain() -> Callable[..., Run]:
    """Runs a recipe as scripts/pretrain.py does.

    ``stop_after`` is the step during which somebody asks to stop. What stands after the training (final/, numbers,
    plots) takes more time than all else, so it is left out unless ``finishes``.
    """
    return run_recipe


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, shards_dir: Path) -> Run:
    """The recipe's run with all that it leaves, for tests that only look at it."""
    return run_recipe(tiny_recipe(tmp_path_factory.mktemp("finished"), shards_dir), finishes=True)


@pytest.fixture
def assert_equal_tensors() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]:
    """Two sets of named tensors are the same bit for bit."""

    def check(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
        assert left.keys() == right.keys()
        differing = [name for name in left if not torch.equal(left[name], right[name])]
        assert differing == []

    return check
