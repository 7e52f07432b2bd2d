"""The configuration and the command line in front of it."""

import ast
import dataclasses
import inspect
import itertools
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from gpt2x.command_line import parse_recipe
from gpt2x.config import (
    ChatSection,
    CorpusSection,
    DataSection,
    EvaluationSection,
    FinetuneRecipe,
    GenerationRecipe,
    HubSection,
    LoraSection,
    ModelSection,
    OptimizerSection,
    PreparationRecipe,
    Recipe,
    RunSection,
    SourceSection,
    StreamSection,
    TokenizerRecipe,
    TokenizerSection,
    TrainSection,
    accumulation_steps,
    to_yaml,
)

ROOT = Path(__file__).parents[1]
SECTIONS = {
    "run": RunSection,
    "model": ModelSection,
    "data": DataSection,
    "hub": HubSection,
    "train": TrainSection,
    "optimizer": OptimizerSection,
    "evaluation": EvaluationSection,
}
SMALL = {"data": {"path": "shards", "sequence_length": 64}, "train": {"max_steps": 10}}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write_yaml(tmp_path / "small.yaml", SMALL)


def write_yaml(file: Path, content: object) -> Path:
    file.write_text(yaml.safe_dump(content))
    return file


def parse(*argv: str | Path) -> Recipe:
    return parse_recipe(Recipe, [str(argument) for argument in argv], script="pretrain.py")[0]


def complaint(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one line that a mistake on the command line ends with, without the program's name."""
    with pytest.raises(SystemExit) as exit_:
        parse(*argv)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("pretrain.py: error: ")
    return captured.err.removeprefix("pretrain.py: error: ").rstrip("\n")


# --- the rules of each section ---------------------------------------------------------------------------------------

BROKEN_RULES = [
    (
        RunSection,
        {"name": "a/b"},
        "run.name (a/b) must be a name of letters, digits, '.', '_' and '-', without folders; folders are set by "
        "run.dir.",
    ),
    (
        RunSection,
        {"name": "a" * 250},
        f"run.name ({'a' * 27} ... {'a' * 28}) has 250 characters, and 200 at most; shorten it.",
    ),
    (
        DataSection,
        {"path": "x", "sequence_length": 0},
        "data.sequence_length (0) must be a whole number from 1 to 100,000,000; the default is 1024.",
    ),
    (
        DataSection,
        {},
        "data.path is needed: a directory of token shards as scripts/prepare_data.py makes them, or token files of "
        "another project; or else a stream.",
    ),
    *(
        (
            DataSection,
            {"path": "x", "skip": skip},
            f"data.skip ({skip}) must list batches that do not overlap, as 120-135 or 7, 120-135.",
        )
        for skip in ("a", "9-7", "3-5, 5-6", "1-")
    ),
    (
        DataSection,
        {"path": "x", "num_workers": -1},
        "data.num_workers (-1) must be a whole number from 0 to 1,024; the default is 1.",
    ),
    (
        DataSection,
        {"path": "x", "sources": [SourceSection(path=Path("y"))]},
        "data.path and data.sources exclude each other; set data.path to null or make it one of the sources.",
    ),
    (
        DataSection,
        {"sources": [SourceSection(path=Path("a/x")), SourceSection(path=Path("b/x"))]},
        "data.sources: two are called x; give each its own name.",
    ),
    (HubSection, {"push": True}, "hub.push needs hub.repo_id: USER/NAME."),
    (
        HubSection,
        {"push": True, "repo_id": "user/name", "public": True},
        "hub.public needs hub.license, an identifier that the Hub knows: mit, apache-2.0, other ...",
    ),
    (
        SourceSection,
        {"path": "x", "weight": 0.0},
        "data.sources.weight (0.0) must be a number above 0 and at most 1,000,000,000.",
    ),
    (
        SourceSection,
        {
            "path": "x",
            "stream": StreamSection(
                corpus=CorpusSection(kind="dataset", dataset="json"), tokenizer="t", cache_dir=Path("c")
            ),
        },
        "data.path and data.stream exclude each other; set one of them to null, or make each one of data.sources.",
    ),
    (
        StreamSection,
        {"corpus": CorpusSection(), "tokenizer": "t", "cache_dir": "c"},
        "stream.corpus.kind (python_stdlib) must be dataset; give corpus.dataset, for local files json, parquet or "
        "text with corpus.data_files, or prepare the corpus before.",
    ),
    (
        StreamSection,
        {
            "corpus": CorpusSection(kind="dataset", dataset="json"),
            "tokenizer": "t",
            "cache_dir": "c",
            "max_cached_shards": 15,
        },
        "stream.max_cached_shards (15) must be at least 2 x stream.shards_per_era = 16: one era is read while the "
        "next is filled.",
    ),
    (
        CorpusSection,
        {"kind": "dataset"},
        "corpus.kind (dataset) needs corpus.dataset: a Hub id, or json, parquet, arrow or text with "
        "corpus.data_files.",
    ),
    (
        CorpusSection,
        {"dataset": "a/b"},
        "corpus.dataset (a/b) is for corpus.kind dataset, and kind is python_stdlib; set corpus.kind dataset, or "
        "leave the dataset out.",
    ),
    (
        CorpusSection,
        {"document_separator": ""},
        'corpus.document_separator ("") must not be empty; null makes each file one document.',
    ),
    (
        CorpusSection,
        {"validation_fraction": 1.0},
        "corpus.validation_fraction (1.0) must be a number of at least 0 and below 1; the default is 0.05.",
    ),
    (
        CorpusSection,
        {"kind": "files"},
        "corpus.kind (files) needs corpus.paths: files, folders or patterns, as [texts, b.jsonl].",
    ),
    (
        CorpusSection,
        {"paths": ["a.txt"]},
        "corpus.paths ([a.txt]) is for corpus.kind files, and kind is python_stdlib; set corpus.kind files, or leave "
        "the paths out.",
    ),
    (
        TokenizerSection,
        {"path": "x", "vocab_size": 256},
        "tokenizer.vocab_size (256) must be a whole number from 257 to 100,000,000.",
    ),
    (
        RunSection,
        {"seed": 2**32},
        "run.seed (4294967296) must be a whole number from 0 to 4,294,967,295; the default is 1337.",
    ),
    (
        TrainSection,
        {"max_steps": 1, "max_time_s": 2.0},
        "exactly one budget of train.max_steps, train.max_tokens, train.max_time_s, train.num_train_epochs is needed; "
        "max_steps, max_time_s are given, set the others to null.",
    ),
    *[
        (
            TrainSection,
            {"max_steps": 1, "keep_steps": 100, "save_steps": None if save_steps == "null" else save_steps},
            f"train.keep_steps (100) must be a multiple of train.save_steps ({save_steps}), at which checkpoints are "
            f"made.",
        )
        for save_steps in (30, "null")
    ],
    (
        TrainSection,
        {"max_time_s": -1.5},
        "train.max_time_s (-1.5) must be a number above 0 and at most 1,000,000,000.",
    ),
    (
        OptimizerSection,
        {"adam_beta2": 1.0},
        "optimizer.adam_beta2 (1.0) must be a number of at least 0 and below 1; the default is 0.95.",
    ),
    (
        OptimizerSection,
        {"min_lr_ratio": float("nan")},
        "optimizer.min_lr_ratio (.nan) must be a number from 0 to 1; the default is 0.1.",
    ),
    (
        GenerationRecipe,
        {"temperature": 1e-30},
        "temperature (1e-30) must be 0, which takes the likeliest token, or at least 0.001.",
    ),
    (
        GenerationRecipe,
        {"system": "Be brief."},
        "system (Be brief.) is the first turn of a conversation; give --chat with it, or leave it out.",
    ),
]


@pytest.mark.parametrize(("section", "fields", "message"), BROKEN_RULES, ids=lambda value: str(value)[:60])
def test_a_broken_rule_is_refused_with_value_rule_and_remedy(section, fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        section(**fields)


def test_a_recipe_without_a_budget_is_refused():
    with pytest.raises(ValueError, match=r"exactly one budget of .* is needed; none is given"):
        TrainSection()


def test_sequences_longer_than_the_model_are_refused():
    data = DataSection(path=Path("x"), sequence_length=2048)
    message = (
        "data.sequence_length (2048) must not exceed model.max_position_embeddings (1024); "
        "shorten the one or raise the other."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Recipe(data=data, train=TrainSection(max_steps=1))


def test_the_shape_of_a_model_that_is_continued_is_its_own_affair():
    data = DataSection(path=Path("x"), sequence_length=2048)
    assert Recipe(data=data, train=TrainSection(max_steps=1), init_from="somewhere").init_from == "somewhere"


def test_shards_lie_where_the_preparation_puts_them_unless_a_path_is_given():
    preparation = PreparationRecipe(output_dir=Path("made"), tokenizer=TokenizerSection(path="x"))
    assert [source.location for source in DataSection(preparation=preparation).mixture] == ["made"]
    given = DataSection(preparation=preparation, path=Path("given"))
    assert [source.location for source in given.mixture] == ["given"]


# --- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens_per_step", "micro_batch_size", "num_processes", "steps"),
    [(16_384, 16, 1, 1), (16_384, 4, 1, 4), (16_384, 1, 1, 16), (16_384, 4, 2, 2), (16_384, 8, 2, 1)],
)
def test_accumulation_follows_from_the_tokens_of_a_step(tokens_per_step, micro_batch_size, num_processes, steps):
    got = accumulation_steps(
        tokens_per_step, micro_batch_size=micro_batch_size, sequence_length=1024, num_processes=num_processes
    )
    assert got == steps


@pytest.mark.parametrize(("tokens_per_step", "nearest"), [(100_000, 98_304), (1_000, 32_768)])
def test_tokens_that_do_not_divide_are_refused_with_a_number_that_does(tokens_per_step, nearest):
    message = (
        f"train.tokens_per_step ({tokens_per_step}) must be a multiple of micro_batch_size x sequence_length x "
        f"data-parallel processes = 16 x 1024 x 2 = 32768; set it to {nearest} or change micro_batch_size."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        accumulation_steps(tokens_per_step, micro_batch_size=16, sequence_length=1024, num_processes=2)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 2])
def test_overrides_win_wherever_they_stand(recipe_file, position):
    argv = ["--model.hidden_size=96", "--optimizer.learning_rate=0.1"]
    argv.insert(position, f"--config={recipe_file}")
    recipe = parse(*argv, "--data.sequence_length", "32")
    assert recipe.model.hidden_size == 96
    assert recipe.optimizer.learning_rate == 0.1
    assert recipe.data.sequence_length == 32
    assert recipe.train.max_steps == 10


def test_an_override_in_front_of_a_separate_config_argument_wins(recipe_file):
    assert parse("--data.sequence_length", "32", "--config", recipe_file).data.sequence_length == 32


def test_the_file_of_the_recipe_is_returned(recipe_file):
    assert parse_recipe(Recipe, ["--config", str(recipe_file)], script="pretrain.py")[1] == recipe_file


def test_without_config_the_default_recipe_is_read(recipe_file):
    recipe, file = parse_recipe(Recipe, [], script="pretrain.py", default_config=recipe_file)
    assert (recipe.train.max_steps, file) == (10, recipe_file)


def test_flags_alone_make_a_recipe():
    recipe, file = parse_recipe(Recipe, ["--data.path=x", "--train.max_steps=1"], script="pretrain.py")
    assert (recipe.data.path, file) == (Path("x"), None)


@pytest.mark.parametrize("flag", ["--train.max_tokens=4096", "--train.max_time_s=4096"])
def test_a_budget_on_the_command_line_replaces_the_recipes(recipe_file, flag):
    train = parse("--config", recipe_file, flag).train
    given = [train.max_steps, train.max_tokens, train.max_time_s]
    assert [value for value in given if value is not None] == [4096]
    assert train.max_steps is None


def test_a_section_may_be_a_file_relative_to_the_recipe_that_names_it(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "pretrain").mkdir()
    write_yaml(tmp_path / "model" / "narrow.yaml", {"hidden_size": 48})
    recipe_file = write_yaml(tmp_path / "pretrain" / "x.yaml", SMALL | {"model": "../model/narrow.yaml"})
    assert parse("--config", recipe_file).model == ModelSection(hidden_size=48)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--train.mx_steps", "3"], "train.mx_steps is no field; did you mean train.max_steps?"),
        (["--mx_steps=3"], "mx_steps is no field; did you mean train.max_steps?"),
        (["--qqqqqqqq", "3"], "qqqqqqqq is no field; there are run, data, train, optimizer, "),
        (
            ["--train.max_steps", "many"],
            "train.max_steps (many) must be a whole number from 1 to 1,000,000,000,000,000 or null.",
        ),
        (
            ["--train.max_steps", "3", "--train.max_tokens", "3"],
            "exactly one budget of train.max_steps, train.max_tokens, train.max_time_s, train.num_train_epochs is "
            "needed; max_steps, max_tokens are given, set the others to null.",
        ),
        (["--train.max_steps"], "--train.max_steps needs a value: a whole number from 1 to "),
        (["--train.max_steps", "--resume"], "--train.max_steps needs a value: a whole number from 1 to "),
        (["--train.max_steps=0"], "train.max_steps (0) must be a whole number from 1 to "),
        (["--optimizer.name", "adam"], "optimizer.name (adam) must be adamw or muon; did you mean adamw?"),
        (["--optimizer.name", "sgd"], "optimizer.name (sgd) must be adamw or muon."),
        (["--run.report_to", "wandb"], "run.report_to (wandb) must be a list of texts, as [a, b]; write [wandb]."),
        (["--resume", "maybe"], "resume (maybe) must be true or false."),
        (["runs/x"], "runs/x is no option; give it as --FIELD runs/x, or leave it out."),
        (["--data.sources=[{path: a, weight: heavy}]"], "data.sources[0].weight (heavy) must be a number above 0 "),
        (
            ["--model", "gpt3"],
            "model (gpt3) is no file here, and none that gpt2x has; did you mean configuration/model/",
        ),
        (["--data.stream.tokenizer", "x"], "data.stream.cache_dir is needed; give --data.stream.cache_dir VALUE, "),
        (["--config"], "--config needs the path of a recipe, a YAML file as those in configuration/."),
        (
            ["--config", "configuration/pretrain/quickstrat.yaml"],
            "configuration/pretrain/quickstrat.yaml does not exist; did you mean configuration/pretrain/quickstart.",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, recipe_file, argv, line):
    assert complaint(capsys, "--config", recipe_file, *argv).startswith(line)


def test_an_abbreviated_field_is_refused_with_the_whole_name(capsys, recipe_file):
    line = complaint(capsys, "--config", recipe_file, "--train.max_step", "3")
    assert line == "train.max_step is no field; did you mean train.max_steps?"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"train": {"max_stepz": 3}},
            "train.max_stepz is no field; did you mean train.max_steps?",
        ),
        (
            {"trian": {"max_steps": 3}},
            "trian is no field; did you mean train?",
        ),
        ({"data": {"sequence_length": 64}}, "data.path is needed: "),
        ({"train": {}}, "exactly one budget of "),
        ({"data": {"path": "x", "sequence_length": 4096}}, "data.sequence_length (4096) must not exceed "),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(capsys, tmp_path, changes, line):
    assert complaint(capsys, "--config", write_yaml(tmp_path / "x.yaml", SMALL | changes)).startswith(line)


def test_a_recipe_that_is_not_there_is_named(capsys, tmp_path):
    line = complaint(capsys, "--config", tmp_path / "none.yaml")
    assert line == f"{tmp_path / 'none.yaml'} does not exist; correct the path."


def test_a_recipe_that_is_no_yaml_is_refused_in_one_line(capsys, tmp_path):
    (tmp_path / "x.yaml").write_text("train: [\n")
    line = complaint(capsys, "--config", tmp_path / "x.yaml")
    assert re.fullmatch(rf"{tmp_path}/x.yaml: line 2: .*; this is no YAML\.", line)


def test_a_section_file_that_is_not_there_is_named(capsys, tmp_path):
    recipe_file = write_yaml(tmp_path / "x.yaml", SMALL | {"model": "../model/none.yaml"})
    line = complaint(capsys, "--config", recipe_file)
    assert line.startswith(f"{recipe_file}: model (../model/none.yaml) is no file beside it, and none that gpt2x has;")


# --- the resolved recipe ---------------------------------------------------------------------------------------------


def test_the_resolved_recipe_reads_back_to_an_equal_one(tmp_path, recipe_file):
    rope = '{"rope_type": "default", "rope_theta": 10000.0}'
    overrides = ["--model.position_embedding=rope", f"--model.rope_parameters={rope}", "--run.report_to=[tensorboard]"]
    recipe = parse("--config", recipe_file, *overrides)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(to_yaml(recipe))
    assert recipe.model.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert parse("--config", resolved) == recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora.rank", "0"], "lora.rank (0) must be a whole number from 1 to 100,000; the default is 16."),
        (
            ["--data.preparation.chat.max_length", "0"],
            "data.preparation.chat.max_length (0) must be a whole number from 1 to 100,000,000.",
        ),
        (
            ["--data.preparation.corpus.kind", "files"],
            "corpus.kind (files) needs corpus.paths: files, folders or patterns, ",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_rule_of_an_optional_section_is_told_in_its_own_words(capsys, arguments, message):
    chat = ROOT / "configuration" / "finetune" / "chat.yaml"
    with pytest.raises(SystemExit):
        parse_recipe(FinetuneRecipe, arguments, script="finetune.py", default_config=chat)
    assert capsys.readouterr().err.startswith(f"finetune.py: error: {message}")


RECIPES = sorted((ROOT / "configuration").rglob("*.yaml"))


def recipe_class_of(file: Path) -> type:
    content = yaml.safe_load(file.read_text())
    if file.parent.name == "data":
        return PreparationRecipe if "output_dir" in content else TokenizerRecipe
    return FinetuneRecipe if file.parent.name == "finetune" else Recipe


@pytest.mark.parametrize(
    "file",
    [file for file in RECIPES if file.parent.name != "model"],
    ids=lambda file: f"{file.parent.name}/{file.stem}",
)
def test_every_recipe_parses_and_its_resolved_form_reads_back(tmp_path, file):
    recipe_class = recipe_class_of(file)
    recipe, _ = parse_recipe(recipe_class, ["--config", str(file)], script="x.py")
    resolved = tmp_path / "config.yaml"
    resolved.write_text(to_yaml(recipe))
    assert parse_recipe(recipe_class, ["--config", str(resolved)], script="x.py")[0] == recipe


@pytest.mark.parametrize("file", [file for file in RECIPES if file.parent.name == "model"], ids=lambda file: file.stem)
def test_every_model_recipe_parses(recipe_file, file):
    recipe = parse("--config", recipe_file, f"--model={file}")
    content = yaml.safe_load(file.read_text())
    assert {name: getattr(recipe.model, name) for name in content} == content


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_lists_every_field_with_its_docstring_within_two_seconds_and_without_torch():
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('LOADED', sorted({'torch', 'transformers'} & set(sys.modules))))\n"
        "from gpt2x.command_line import parse_recipe\n"
        "from gpt2x.config import Recipe\n"
        "parse_recipe(Recipe, ['--help'], script='pretrain.py')\n"
    )
    start = time.perf_counter()
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert time.perf_counter() - start < 2
    assert finished.returncode == 0
    assert finished.stdout.endswith("LOADED []\n")
    text = "".join(finished.stdout.split())  # argparse breaks lines at hyphens too
    for prefix, section in {"": Recipe, **{f"{name}.": section for name, section in SECTIONS.items()}}.items():
        for field, docstring in attribute_docstrings(section).items():
            assert re.search(rf"--{prefix}{field}\b", finished.stdout), f"{prefix}{field}"
            assert "".join(docstring.split()) in text, f"{prefix}{field}"


def attribute_docstrings(section: type) -> dict[str, str]:
    """Field -> the string under it, read from the source without jsonargparse."""
    found = {}
    for owner in reversed([owner for owner in section.__mro__ if dataclasses.is_dataclass(owner)]):
        body = ast.parse(inspect.getsource(owner)).body[0].body
        found |= {
            statement.target.id: " ".join(below.value.value.split())
            for statement, below in itertools.pairwise(body)
            if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr)
        }
    return found


@pytest.mark.parametrize(
    "section",
    [
        *(*SECTIONS.values(), CorpusSection, TokenizerSection, PreparationRecipe, SourceSection, StreamSection),
        *(ChatSection, LoraSection, Recipe, FinetuneRecipe),
    ],
)
def test_every_field_of_a_section_is_documented_or_a_section(section):
    undocumented = {field.name for field in dataclasses.fields(section)} - set(attribute_docstrings(section))
    assert undocumented <= {*SECTIONS, "corpus", "tokenizer"}


# --- the model section -----------------------------------------------------------------------------------------------

# Of a model's config, not of a recipe: the tokenizer gives the ids, and the loop turns the cache off.
NOT_IN_RECIPES = {"use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}


def test_the_model_section_has_the_fields_and_defaults_of_the_models_config():
    from transformers import PreTrainedConfig

    from modeling_gpt2x import GPT2XConfig

    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = set(inspect.get_annotations(GPT2XConfig))
    config = {
        field.name: field.default
        for field in dataclasses.fields(GPT2XConfig)
        if field.name in own or field.name not in inherited
    }
    section = {field.name: field.default for field in dataclasses.fields(ModelSection)}
    # rope_parameters is an attribute that transformers' configs have with RoPE only, so it is no field of GPT2XConfig.
    assert set(section) - {"rope_parameters"} == set(config) - NOT_IN_RECIPES
    differences = {name: (section[name], config[name]) for name in section if name in config}
    assert {name for name, (ours, theirs) in differences.items() if ours != theirs} == {"vocab_size"}
    assert section["vocab_size"] is None


def test_the_model_section_takes_the_choices_of_the_models_config():
    from modeling_gpt2x.configuration_gpt2x import CHOICES

    hints = get_type_hints(ModelSection)
    assert {name: get_args(hints[name]) for name in CHOICES} == CHOICES
