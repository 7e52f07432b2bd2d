"""Mistakes of newcomers and what each of them is told: `python tests/trials/mistakes.py` writes docs/mistakes.md.

Every line must name the value, the rule and the remedy, in the user's words; it is read aloud before it is kept.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "mistakes.md"
_HEADER = """# What a mistake is told

What was typed, and what came of it; `python tests/trials/mistakes.py` writes this file, and the trial
`tests/trials/test_mistakes.py` compares it. All of it was typed where `runs/tiny` (finished), `runs/begun` (stopped
before its first checkpoint), `data/texts` (token shards), `models/`, `adapters/`, some texts and recipes lie, or where
nothing lies yet; without network and token, and without the libraries that are called missing. A mistake in a recipe
or an option ends with exit code 2, any other with 1, and nothing is lost.
"""
# Stands before the others on the module path, so that a library counts as not installed.
_ABSENT = "import os, sys\nsys.modules.update(dict.fromkeys(os.environ.get('ABSENT', '').split()))\n"


@dataclass(frozen=True)
class Mistake:
    """One command that cannot do what was meant."""

    typed: str
    """Script and arguments, as in a shell."""
    value: str
    """What the line must name."""
    remedy: str
    """What the line must advise."""
    absent: str = ""
    """Libraries that count as not installed."""
    has_token: bool = False
    """Whether there is a token of the Hub."""
    is_table: bool = False
    """Whether a table of differences follows, which may be as long as it is."""
    is_launched: bool = False
    """Whether it is run by accelerate launch, which adds lines of its own."""
    place: str = "home"
    """Where it is typed: in `home`, or in `empty`, before anything has been made."""


@dataclass(frozen=True)
class Told:
    """What came of it."""

    code: int
    lines: list[str]
    """Of stderr, as they stand in the table; under a launcher ours alone."""
    stdout: str
    seconds: float


LAUNCHER = ["-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1"]
CORPUS = "--corpus.kind files --corpus.paths"
TRAINED = "--tokenizer.path ./tok --tokenizer.vocab_size 300"
GIVEN = "--tokenizer.path data/tokenizer"
CHAT = "--chat.template tokenization/plain.jinja"
TINY = "pretrain.py --config recipes/tiny.yaml"

MISTAKES: dict[str, list[Mistake]] = {
    "Sampling and chat": [
        Mistake("generate.py", "runs/quickstart", "pretrain.py", place="empty"),
        Mistake("generate.py runs/tinny", "runs/tinny", "tiny"),
        Mistake("generate.py modells/gpt2", "modells/gpt2", "directory"),
        Mistake("generate.py models/gpt3", "models/gpt3", "gpt2"),
        Mistake("generate.py texts/00.txt", "texts/00.txt", "give"),
        Mistake("generate.py data/texts", "data/texts", "train one"),
        Mistake("generate.py runs/begun", "runs/begun", "train one"),
        Mistake("generate.py models/cut", "models/cut", "restore"),
        Mistake("generate.py models/bare", "models/bare", "copy"),
        Mistake("generate.py models/untold", "models/untold", "copy"),
        Mistake("generate.py models/stranger --prompt x", "models/stranger", "another model"),
        Mistake("generate.py adapters/lost", "runs/gone/final", "belong"),
        Mistake("generate.py adapters/lora", "peft", "pip install", absent="peft"),
        Mistake("generate.py runs/tiny --chat true", "runs/tiny", "finetune.py"),
        Mistake("generate.py runs/tiny --promt x", "promt", "prompt"),
        Mistake("generate.py runs/tiny --prompt x --system 'Be brief.'", "system", "chat"),
        Mistake("generate.py runs/tiny --max_new_tokens 0", "max_new_tokens (0)", "from 1"),
        Mistake("generate.py runs/tiny --temperature -1", "temperature (-1", "from 0"),
        Mistake("generate.py runs/tiny --top_p 95", "top_p (95)", "at most 1"),
        Mistake("generate.py runs/tiny --dtype float16", "dtype", "bfloat16"),
        Mistake("generate.py runs/tiny --seed one", "seed (one)", "whole number"),
    ],
    "Evaluation": [
        Mistake("eval_hellaswag.py runs/tiny --data items", "items", ".jsonl"),
        Mistake("eval_hellaswag.py runs/tiny", "Rowan/hellaswag", ".jsonl"),
        Mistake("eval_hellaswag.py runs/tiny --data others.jsonl", "others.jsonl:1", "columns"),
        Mistake("eval_hellaswag.py runs/tiny --data texts/00.txt", "texts/00.txt:1", "JSON"),
        Mistake("eval_hellaswag.py runs/tiny --data items.jsonl --num_items 100", "num_items (100)", "lower"),
        Mistake("eval_hellaswag.py runs/tiny --data items.jsonl --quantize int4", "quantize", "int8"),
        Mistake("eval_hellaswag.py runs/gone --data items.jsonl", "runs/gone", "tiny"),
        Mistake("run_lm_eval.py runs/tiny --tasks piqa", "lm_eval", "pip install", absent="lm_eval"),
        Mistake("run_lm_eval.py runs/tiny", "tasks", "--tasks"),
    ],
    "Export": [
        Mistake("export.py runs/tiny", "to", "--to"),
        Mistake("export.py runs/tiny --to gguff", "gguff", "gguf"),
        Mistake("export.py runs/tiny --to native --dtype int8", "dtype (int8)", "bfloat16"),
        Mistake("export.py models/nanochat --to gguf", "nanochat", "onnx"),
        Mistake("export.py runs/tiny --to onnx", "onnxscript", "pip install", absent="onnxscript"),
        Mistake("export.py runs/tiny --to gguf", "gguf", "pip install", absent="gguf"),
        Mistake("export.py runs/tiny --to native --output texts", "texts", "--output"),
        Mistake("export.py runs/tiny --to native --output runs/tiny/final", "runs/tiny/final", "--output"),
        Mistake("export.py runs/tiny --to native --output runs/tiny", "runs/tiny", "--output"),
        Mistake("export.py runs/tiny --to native --output texts/00.txt", "texts/00.txt", "--output"),
        Mistake("export.py adapters/lost --to native", "runs/gone/final", "belong"),
        Mistake("export.py runs/begun --to native", "runs/begun", "train one"),
    ],
    "Publishing": [
        Mistake("push_to_hub.py runs/tiny", "repo_id", "--repo_id"),
        Mistake("push_to_hub.py runs/tiny --repo_id me/tiny", "token", "HF_TOKEN"),
        Mistake("push_to_hub.py runs/tiny --repo_id tiny", "repo_id", "USER/NAME", has_token=True),
        Mistake("push_to_hub.py runs/tiny --repo_id 'me/my model'", "me/my model", "USER/NAME", has_token=True),
        Mistake("push_to_hub.py runs/tiny --repo_id me/tiny --public true", "public", "license", has_token=True),
        Mistake("push_to_hub.py runs/begun --repo_id me/begun", "runs/begun", "train one", has_token=True),
        Mistake("push_to_hub.py openai-community/gpt2 --repo_id me/gpt2", "openai-community", "give", has_token=True),
        Mistake("push_to_hub.py adapters/lora --repo_id me/lora", "models/gpt2", "lora.merge", has_token=True),
    ],
    "Preparing data": [
        Mistake(f"prepare_data.py {CORPUS} '[text]' {TRAINED} --output_dir data/x", "text", "correct"),
        Mistake(f"prepare_data.py {CORPUS} texts {TRAINED} --output_dir data/x", "texts", "[texts]"),
        Mistake(f"prepare_data.py {CORPUS} '[notes.docx]' {TRAINED} --output_dir data/x", "notes.docx", "save it"),
        Mistake(f"prepare_data.py {CORPUS} '[pictures]' {TRAINED} --output_dir data/x", "pictures", ".txt"),
        Mistake(f"prepare_data.py {CORPUS} '[picture.txt]' {GIVEN} --output_dir data/x", "picture.txt", "text"),
        Mistake(f"prepare_data.py {CORPUS} '[table.parquet]' {GIVEN} --output_dir data/x", "table.parquet", "Parquet"),
        Mistake(f"prepare_data.py {CORPUS} '[cut.jsonl.gz]' {GIVEN} --output_dir data/x", "cut.jsonl.gz", "repair"),
        Mistake(f"prepare_data.py {CORPUS} '[broken.jsonl]' {GIVEN} --output_dir data/x", "broken.jsonl:2", "correct"),
        Mistake(f"prepare_data.py {CORPUS} '[bodies.jsonl]' {GIVEN} --output_dir data/x", "body", "text_column"),
        Mistake(f"prepare_data.py {CORPUS} '[models/gpt2]' {GIVEN} --output_dir data/x", "models/gpt2", "text_column"),
        Mistake(f"prepare_data.py {CORPUS} '[texts]' --output_dir data/x", "tokenizer.path", "--tokenizer.path"),
        Mistake(f"prepare_data.py {CORPUS} '[texts]' --tokenizer.path tok --output_dir data/x", "tok", "train_tok"),
        Mistake(
            f"prepare_data.py {CORPUS} '[texts]' --tokenizer.path me/tok --tokenizer.vocab_size 300 "
            f"--output_dir data/x",
            "me/tok",
            "./me/tok",
        ),
        Mistake(
            f"prepare_data.py {CORPUS} '[texts]' --tokenizer.path ./tok --tokenizer.vocab_size 60000 "
            f"--output_dir data/x",
            "60000",
            "set it to",
        ),
        Mistake(
            f"prepare_data.py {CORPUS} '[texts]' --tokenizer.path data/tokenizer --tokenizer.vocab_size 200 "
            f"--output_dir data/x",
            "200",
            "257",
        ),
        Mistake(f"prepare_data.py {CORPUS} '[texts]' {GIVEN} --output_dir notes.docx", "notes.docx", "another"),
        Mistake(f"prepare_data.py {CORPUS} '[texts]' {GIVEN} --output_dir data/texts", "data/texts", "output_dir"),
        Mistake("prepare_data.py --config recipes/texts.yaml --task 9", "task (9)", "num_tasks (1)"),
        Mistake("prepare_data.py --config recipes/texts.yaml --corpus.validation_fraction 2", "2", "0.05"),
        Mistake("prepare_data.py --config recipes/texts.yaml --corpus.kind file", "file", "files"),
        Mistake(f"prepare_data.py --corpus.kind dataset {GIVEN} --output_dir data/x", "dataset", "Hub id"),
        Mistake(
            f"prepare_data.py --corpus.kind dataset --corpus.dataset wiki/none {GIVEN} --output_dir data/x",
            "wiki/none",
            "again",
        ),
        Mistake(
            f"prepare_data.py --corpus.kind dataset --corpus.dataset json --corpus.data_files '[x.jsonl]' {GIVEN} "
            f"--output_dir data/x",
            "x.jsonl",
            "correct",
        ),
        Mistake(f"prepare_data.py {CORPUS} '[polls.jsonl]' {GIVEN} {CHAT} --output_dir data/x", "question", "rename"),
        Mistake(f"prepare_data.py {CORPUS} '[silent.jsonl]' {GIVEN} {CHAT} --output_dir data/x", "silent", "drop"),
        Mistake(
            f"prepare_data.py {CORPUS} '[silent.jsonl]' {GIVEN} --chat.template mine.jinja --output_dir data/x",
            "mine.jinja",
            "correct",
        ),
        Mistake(
            f"train_tokenizer.py {CORPUS} '[texts]' --tokenizer.path data/tokenizer --tokenizer.vocab_size 280",
            "280",
            "tokenizer.path",
        ),
        Mistake(f"train_tokenizer.py {CORPUS} '[gone/*.txt]' {TRAINED}", "gone/*.txt", "correct"),
        Mistake("import_tokens.py --path gone.bin --tokenizer data/tokenizer --output_dir data/x", "gone.bin", "give"),
        Mistake("import_tokens.py --path ids.bin --tokenizer tok --output_dir data/x", "tok", "directory"),
        Mistake("import_tokens.py --path odd.bin --tokenizer data/tokenizer --output_dir data/x", "63", "again"),
        Mistake(
            "import_tokens.py --path high.bin --tokenizer data/tokenizer --output_dir data/x", "60000", "tokenizer"
        ),
        Mistake(
            "import_tokens.py --path texts --tokenizer data/tokenizer --output_dir data/x", "texts", "prepare_data"
        ),
    ],
    "Recipes": [
        Mistake("pretrain.py --config recipes/tinny.yaml", "recipes/tinny.yaml", "recipes/tiny.yaml"),
        Mistake("pretrain.py --config recipes/open.yaml", "recipes/open.yaml", "YAML"),
        Mistake("pretrain.py --config recipes/list.yaml", "recipes/list.yaml", "fields"),
        Mistake("pretrain.py --config recipes/twice.yaml", "max_steps", "keep one"),
        Mistake("pretrain.py --config texts", "texts", "correct"),
        Mistake(f"{TINY} --train.max_step 3", "max_step", "train.max_steps"),
        Mistake(f"{TINY} --optimiser.name muon", "optimiser.name", "optimizer"),
        Mistake(f"{TINY} --optimizer.name adam", "adam", "adamw"),
        Mistake(f"{TINY} --train.max_steps ten", "ten", "whole number"),
        Mistake(f"{TINY} --train.torch_compile yess", "yess", "true or false"),
        Mistake(f"{TINY} --train.max_steps 2 --train.max_tokens 9", "max_tokens", "null"),
        Mistake(f"{TINY} --train.tokens_per_step 100 --run.name x", "100", "set it to"),
        Mistake(f"{TINY} --data.sequence_length 128", "128", "64"),
        Mistake(f"{TINY} --optimizer.learning_rate nan", "learning_rate (nan)", "above 0"),
        Mistake(f"{TINY} --optimizer.adam_beta2 1.5", "adam_beta2 (1.5)", "below 1"),
        Mistake(f"{TINY} --model.num_attention_heads 5 --run.name x", "5", "32"),
        Mistake(f"{TINY} --model.hidden_act gelu_neu --run.name x", "gelu_neu", "gelu_new"),
        Mistake(f"{TINY} --model llama.yaml", "llama.yaml", "correct"),
        Mistake(f"{TINY} --data.skip 9-3", "9-3", "120-135"),
    ],
    "Training": [
        Mistake(f"{TINY} --run.name a/b", "a/b", "letters"),
        Mistake(f"{TINY} --run.dir texts/00.txt", "texts/00.txt", "run.dir"),
        Mistake(f"{TINY} --run.dir . --run.name models", "models", "run"),
        Mistake(f"{TINY} --run.report_to '[wandb]' --run.name x", "wandb", "pip install", absent="wandb"),
        Mistake(f"{TINY} --run.report_to '[wanda]' --run.name x", "wanda", "wandb"),
        Mistake(f"{TINY} --hub.push true --run.name x", "hub.push", "repo_id"),
        Mistake(f"{TINY} --hub.push true --hub.repo_id me/x --run.name x", "me/x", "HF_TOKEN"),
        Mistake(f"{TINY} --train.mixed_precision fp16 --run.name x", "fp16", "bf16"),
        Mistake(f"{TINY} --optimizer.learning_rate 0.1", "0.1", "--run.name", is_table=True),
        Mistake(f"{TINY} --data.path data/none --run.name x", "data/none", "texts"),
        Mistake(f"{TINY} --data.path texts --run.name x", "texts", "prepare_data.py"),
        Mistake(f"{TINY} --data.path ids.bin --run.name x", "ids.bin", "data.tokenizer"),
        Mistake(f"{TINY} --data.tokenizer models/gpt2 --run.name x", "models/gpt2", "leave it out"),
        Mistake(f"{TINY} --data.validation_path ids.bin --run.name x", "ids.bin", "leave it out"),
        Mistake(f"{TINY} --init_from models/none --run.name x", "models/none", "gpt2"),
        Mistake(f"{TINY} --init_from models/gpt2 --run.name x", "models/gpt2", "prepare the data"),
        Mistake(
            f"{TINY} --init_from runs/tiny --data.sequence_length 128 --train.tokens_per_step 256 --run.name x",
            "128",
            "64",
        ),
        Mistake(f"{TINY} --evaluation.hellaswag items --run.name x", "items", ".jsonl"),
        Mistake(f"{TINY} --evaluation.hellaswag items.jsonl --run.name x", "evaluation.hellaswag_items", "3"),
        Mistake("finetune.py", "runs/quickstart", "pretrain.py", place="empty"),
        Mistake("finetune.py --init_from runs/tiny", "data/python-stdlib/tokenizer", "train_tokenizer"),
        Mistake("finetune.py --init_from adapters/lora", "adapters/lora", "lora.merge"),
        Mistake("finetune.py --init_from runs/tiny --lora.rank 4", "peft", "pip install", absent="peft"),
        Mistake("finetune.py --init_from runs/tiny --lora.rank 0", "rank (0)", "from 1"),
        Mistake("finetune.py --init_from runs/tiny --data.preparation.chat.max_length 999", "999", "256"),
        Mistake("benchmark.py rase", "rase", "race"),
        Mistake("benchmark.py hellaswag --data items.jsonl", "lm_eval", "pip install", absent="lm_eval"),
        Mistake(f"{TINY} --data.path data/nune --run.name x", "data/nune", "texts", is_launched=True),
        Mistake(f"{TINY} --train.max_step 3", "max_step", "train.max_steps", is_launched=True),
    ],
}


def environment_of(mistake: Mistake | None, scratch: Path) -> dict[str, str]:
    """Without network and token, on one thread, with libraries that count as missing."""
    (scratch / "absent").mkdir(exist_ok=True)
    (scratch / "absent" / "sitecustomize.py").write_text(_ABSENT)
    unwanted = ("HF_TOKEN", "RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH")
    kept = {key: value for key, value in os.environ.items() if key not in unwanted}
    ours = {
        "PYTHONPATH": os.pathsep.join([str(scratch / "absent"), str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "hub"),
        "OMP_NUM_THREADS": "1",
        "ABSENT": mistake.absent if mistake is not None else "",
    }
    return kept | ours | ({"HF_TOKEN": "hf_x"} if mistake is not None and mistake.has_token else {})


def tell(mistake: Mistake, scratch: Path) -> Told:
    """Types a command in a process of its own."""
    script, *arguments = shlex.split(mistake.typed)
    launcher = LAUNCHER if mistake.is_launched else []
    command = [sys.executable, *launcher, str(ROOT / "scripts" / script), *arguments]
    place = scratch / mistake.place
    place.mkdir(exist_ok=True)
    began = time.monotonic()
    done = subprocess.run(
        command,
        cwd=place,
        env=environment_of(mistake, scratch),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    lines = [line for line in done.stderr.splitlines() if line and "%|" not in line]  # no bars of progress
    if mistake.is_launched:
        lines = [line for line in lines if re.match(r"(\w+\.py: )?error: ", line)]
    return Told(
        code=done.returncode,
        lines=[_of_any_machine(line, place) for line in lines],
        stdout=done.stdout,
        seconds=time.monotonic() - began,
    )


def _of_any_machine(line: str, place: Path) -> str:
    for found, shown in {f"{place}/": "", sys.executable: "python", f"{ROOT}/": "", str(ROOT): "."}.items():
        line = line.replace(found, shown)
    return re.sub(r"[^\s`]*/bin/(?=hf |lm_eval )", "", line)


def every() -> Iterator[Mistake]:
    """All of them in order."""
    for mistakes in MISTAKES.values():
        yield from mistakes


def table_of(told: dict[Mistake, Told]) -> str:
    """docs/mistakes.md."""
    parts = [_HEADER]
    for heading, mistakes in MISTAKES.items():
        rows = [f"| `{_cell(shown(mistake))}` | {_cell('<br>'.join(told[mistake].lines))} |" for mistake in mistakes]
        parts.append("\n".join([f"\n## {heading}\n", "| typed | said |", "|---|---|", *rows]) + "\n")
    return "".join(parts)


def shown(mistake: Mistake) -> str:
    """The command as it was typed."""
    return f"accelerate launch {mistake.typed}" if mistake.is_launched else mistake.typed


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Writes docs/mistakes.md, and tells how long each took."""
    from mistakes_disk import lay_out

    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        lay_out(scratch / "home", environment_of(None, scratch))
        told = {}
        for mistake in every():
            told[mistake] = tell(mistake, scratch)
            print(
                f"{told[mistake].seconds:5.1f} s  {told[mistake].code}  {mistake.typed}",
                *told[mistake].lines,
                sep="\n    ",
            )
        TABLE.write_text(table_of(told), encoding="utf-8")


if __name__ == "__main__":
    main()
