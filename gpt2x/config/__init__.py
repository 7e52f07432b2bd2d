"""The configuration of everything that gpt2x runs: typed, documented, validated.

A recipe is YAML whose sections are the dataclasses below; any field can be overridden on the command line
(``--train.max_steps 100``), and a section may be the path of another YAML file, beside the one that names it
(``model: ../model/gpt2.yaml``), see ``parts``. Neither torch nor transformers is imported here, so that ``--help`` and
every complaint about a recipe are instant.
"""

from gpt2x.config.data import (
    CorpusSection,
    DataSection,
    PreparationRecipe,
    SourceSection,
    StreamSection,
    TokenizerRecipe,
    TokenizerSection,
)
from gpt2x.config.finetuning import ChatSection, LoraSection
from gpt2x.config.generation import GenerationRecipe
from gpt2x.config.hub import HubSection
from gpt2x.config.model import ModelSection
from gpt2x.config.recipes import FinetuneRecipe, Recipe, TrainingRecipe, to_yaml
from gpt2x.config.train import (
    BUDGETS,
    EvaluationSection,
    OptimizerSection,
    RunSection,
    TrainSection,
    accumulation_steps,
)

__all__ = [
    "BUDGETS",
    "ChatSection",
    "CorpusSection",
    "DataSection",
    "EvaluationSection",
    "FinetuneRecipe",
    "GenerationRecipe",
    "HubSection",
    "LoraSection",
    "ModelSection",
    "OptimizerSection",
    "PreparationRecipe",
    "Recipe",
    "RunSection",
    "SourceSection",
    "StreamSection",
    "TokenizerRecipe",
    "TokenizerSection",
    "TrainSection",
    "TrainingRecipe",
    "accumulation_steps",
    "to_yaml",
]
