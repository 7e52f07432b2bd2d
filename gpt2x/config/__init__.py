"""The configuration of everything that gpt2x runs: typed, documented, validated.

Each module holds the recipes of the scripts that it is named by, or a section that several share; `checks`, `fields`
and `parts` are what reads them. A recipe is YAML whose sections are these dataclasses; any field can be overridden on
the command line (``--train.max_steps 100``), and a section may be the path of another YAML file, beside the one that
names it (``model: ../model/gpt2.yaml``), see ``parts``. Neither torch nor transformers is imported here, so that
``--help`` and every complaint about a recipe are instant.
"""

from gpt2x.config.data import DataSection, FillerRecipe, SourceSection, StreamSection
from gpt2x.config.evaluate import HellaSwagRecipe, LmEvalRecipe
from gpt2x.config.finetune import FinetuneRecipe, LoraSection
from gpt2x.config.generate import GenerationRecipe
from gpt2x.config.model import ModelSection
from gpt2x.config.parts import to_yaml
from gpt2x.config.prepare import (
    ChatSection,
    CorpusSection,
    ImportRecipe,
    PreparationCommand,
    PreparationRecipe,
    TokenizerRecipe,
    TokenizerSection,
)
from gpt2x.config.pretrain import (
    BUDGETS,
    EvaluationSection,
    HubSection,
    OptimizerSection,
    Recipe,
    RunSection,
    TrainingRecipe,
    TrainSection,
    accumulation_steps,
)
from gpt2x.config.publish import ExportRecipe, PushRecipe

__all__ = [
    "BUDGETS",
    "ChatSection",
    "CorpusSection",
    "DataSection",
    "EvaluationSection",
    "ExportRecipe",
    "FillerRecipe",
    "FinetuneRecipe",
    "GenerationRecipe",
    "HellaSwagRecipe",
    "HubSection",
    "ImportRecipe",
    "LmEvalRecipe",
    "LoraSection",
    "ModelSection",
    "OptimizerSection",
    "PreparationCommand",
    "PreparationRecipe",
    "PushRecipe",
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
