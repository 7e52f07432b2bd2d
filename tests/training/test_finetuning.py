"""Fine-tuning on conversations: the same loop, from a model that exists, all weights or adapters."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2x.config import (
    ChatSection,
    CorpusSection,
    DataSection,
    EvaluationSection,
    FinetuneRecipe,
    LoraSection,
    ModelSection,
    OptimizerSection,
    PreparationRecipe,
    RunSection,
    TokenizerSection,
    TrainSection,
)
from gpt2x.errors import UserError
from gpt2x.models import make_config, save_model
from gpt2x.preflight.before_step_1 import measure_room
from gpt2x.runs.directory import open_run_directory
from gpt2x.tokenizers.bpe import load_tokenizer
from modeling_gpt2x import GPT2XForCausalLM

ROOT = Path(__file__).parents[2]
CHATML = {"special_tokens": ["<|im_start|>", "<|im_end|>"], "end_of_turn": "<|im_end|>"}
LLAMA = {"position_embedding": "rope", "norm": "rms_norm", "hidden_act": "silu", "gated_mlp": True}
LLAMA |= {"attention_bias": False, "mlp_bias": False}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty questions about sums, in the layout of prompt and completion."""
    file = tmp_path_factory.mktemp("chats") / "sums.jsonl"
    rows = [{"prompt": f"value = {n} for {n + 1}?", "completion": f"= {2 * n + 1}" * (n % 3 + 1)} for n in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, shards_dir: Path) -> Path:
    """A stock Llama with the tokenizer of the shards."""
    return save_base(tmp_path_factory.mktemp("base"), shards_dir)


def save_base(directory: Path, shards_dir: Path, **options: object) -> Path:
    tokenizer = load_tokenizer(shards_dir / "tokenizer")
    section = ModelSection(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128, **LLAMA | options
    )
    torch.manual_seed(0)
    save_model(GPT2XForCausalLM(make_config(section, tokenizer)), directory, tokenizer)
    return directory


def make_recipe(
    tmp_path: Path, base: Path, chats: Path, *, template: str = "chatml", **fields: object
) -> FinetuneRecipe:
    chat = CHATML if template == "chatml" else {}
    return FinetuneRecipe(
        init_from=str(base),
        run=RunSection(name="chat", dir=tmp_path / "runs"),
        data=DataSection(
            preparation=PreparationRecipe(
                output_dir=tmp_path / "shards",
                corpus=CorpusSection(kind="files", paths=[str(chats)], validation_fraction=0.2),
                tokenizer=TokenizerSection(path=str(base)),
                chat=ChatSection(template=ROOT / "tokenization" / f"{template}.jinja", **chat),
            ),
            sequence_length=96,
            packing="whole_documents",
        ),
        train=TrainSection(
            **{"max_steps": 6, "tokens_per_step": 768, "micro_batch_size": 4, "mixed_precision": "no"}
            | {"num_threads": 1, "save_steps": 3}
        ),
        optimizer=OptimizerSection(learning_rate=3e-3),
        evaluation=EvaluationSection(eval_steps=3, num_validation_prompts=1, max_new_tokens=4),
        **fields,
    )


def test_a_run_leaves_a_stock_model_with_more_rows_and_the_chat_template(tmp_path, base, chats, pretrain):
    run = pretrain(make_recipe(tmp_path, base, chats), finishes=True)
    final = run.path / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.vocab_size == len(tokenizer) == len(AutoTokenizer.from_pretrained(base)) + 2
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id[0] == tokenizer.eos_token_id
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "self"}], add_generation_prompt=True, tokenize=False
    )
    assert asked == "<|im_start|>user\nself<|im_end|>\n<|im_start|>assistant\n"
    losses = [record["val/loss"] for record in run.records() if "val/loss" in record]
    assert losses[-1] < losses[0]


def test_the_loss_is_that_of_what_the_assistant_says_alone(tmp_path, base, chats, start):
    job, _ = start(make_recipe(tmp_path, base, chats))
    labels = torch.cat([batch["labels"] for batch in job.batches.step(0).micro_batches])
    learned = [job.tokenizer.decode(row[row != -100]) for row in labels]
    assert all(re.fullmatch(r"((= \d+)+<\|im_end\|>)+", text) for text in learned)


def test_six_steps_equal_three_and_three(tmp_path, base, chats, pretrain, assert_equal_tensors):
    recipe = make_recipe(tmp_path, base, chats)
    whole = pretrain(recipe)
    cut = dataclasses.replace(recipe, run=RunSection(name="cut", dir=tmp_path / "runs"))
    pretrain(cut, stop_after=3)
    resumed = pretrain(cut)
    assert_equal_tensors(whole.saved(), resumed.saved())
    assert whole.records() == resumed.records()


def test_an_epoch_is_as_many_steps_as_read_every_sequence_once(tmp_path, base, chats, start):
    recipe = make_recipe(tmp_path, base, chats)
    train = dataclasses.replace(recipe.train, max_steps=None, num_train_epochs=2.5)
    job, _ = start(dataclasses.replace(recipe, train=train))
    (source,) = job.batches.batches.sources.values()
    assert job.budget.max_steps == math.ceil(2.5 * source.num_windows / 8)


def test_data_of_another_tokenizer_is_refused(tmp_path, base, chats, other_shards, start):
    recipe = make_recipe(tmp_path, base, chats)
    data = DataSection(path=other_shards, sequence_length=96)
    with pytest.raises(UserError, match=r"^the data's tokenizer is not that of .*; prepare the data again"):
        start(dataclasses.replace(recipe, data=data))


# --- adapters --------------------------------------------------------------------------------------------------------


def lora_recipe(tmp_path: Path, base: Path, chats: Path, **section: object) -> FinetuneRecipe:
    return make_recipe(tmp_path, base, chats, template="plain", lora=LoraSection(rank=4, **section))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(20)[None]).logits


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 asks by the old name
def test_adapters_load_on_the_stock_model_and_merge_to_the_same(tmp_path, base, chats, pretrain):
    before = load_file(base / "model.safetensors")
    run = pretrain(lora_recipe(tmp_path, base, chats), finishes=True)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.path / "final")
    changed = logits(adapted)
    assert (changed - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-3
    merging = dataclasses.replace(lora_recipe(tmp_path, base, chats, merge=True), resume=True)
    shutil.rmtree(run.path / "final")
    pretrain(merging, finishes=True)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(run.path / "final")), changed, atol=1e-5, rtol=0
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(base / "model.safetensors").items())


def test_a_checkpoint_of_adapters_holds_nothing_of_the_base_and_goes_on_bit_for_bit(tmp_path, base, chats, pretrain):
    recipe = lora_recipe(tmp_path, base, chats, dropout=0.1)
    whole = pretrain(recipe)
    cut = dataclasses.replace(recipe, run=RunSection(name="cut", dir=tmp_path / "runs"))
    pretrain(cut, stop_after=3)
    resumed = pretrain(cut)
    files = ["model/adapter_model.safetensors", "state/optimizer.safetensors"]
    for file in files:
        left, right = (load_file(run.path / "checkpoints" / "step-000006" / file) for run in (whole, resumed))
        assert all("lora_" in name for name in left)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert whole.records() == resumed.records()


def test_adapters_of_another_rank_are_not_gone_on_with(tmp_path, base, chats, pretrain):
    recipe = lora_recipe(tmp_path, base, chats)
    pretrain(recipe)
    other = dataclasses.replace(recipe, lora=LoraSection(rank=8), resume=True)
    with pytest.raises(
        UserError, match=r"cannot go on with another model, which its weights would not fit; (?s:.*)lora.rank  4    8$"
    ):
        open_run_directory(other, name="chat")


def test_new_tokens_are_refused_for_adapters(tmp_path, base, chats, start):
    recipe = make_recipe(tmp_path, base, chats, lora=LoraSection(rank=4))
    with pytest.raises(UserError, match=r"rows of embeddings, which adapters leave as they are; use chat.template"):
        start(recipe)


def test_the_room_of_adapters_is_theirs_and_of_a_merged_model_the_whole(tmp_path, base, chats, start):
    job, _ = start(lora_recipe(tmp_path, base, chats))
    adapters = sum(parameter.numel() for parameter in job.plain_model.parameters() if parameter.requires_grad)
    room = measure_room(job)
    assert (room.checkpoint_bytes, room.model_bytes) == (4 * 3 * adapters, 4 * adapters)
    merging, _ = start(dataclasses.replace(lora_recipe(tmp_path, base, chats, merge=True), resume=True))
    assert measure_room(merging).model_bytes == 4 * sum(p.numel() for p in merging.plain_model.parameters())
