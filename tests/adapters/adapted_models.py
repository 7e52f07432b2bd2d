"""Small stock models of all four forms, adapters on them, and how they are trained."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gpt2x.adapters import adapter_weights, add_adapters, load_base
from gpt2x.config import DataSection, FinetuneRecipe, LoraSection, TrainSection
from gpt2x.tokenizers.bpe import write_tokenizer

VOCAB_SIZE, LENGTH = 41, 32
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "bos_token_id": 1, "eos_token_id": 1}
GPT2_SIZES |= {"vocab_size": VOCAB_SIZE, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
STOCK = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 16, "tie_word_embeddings": True})),
    "nanochat": lambda: NanoChatForCausalLM(NanoChatConfig(**SIZES)),
}
EVERYWHERE = LoraSection(rank=4, alpha=8.0, target_modules=["all-linear"])


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    words = {"<eos>": 1} | {str(number): number for number in range(size) if number != 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<eos>", pad_token="<eos>")


def make_stock(name: str) -> PreTrainedModel:
    """A model none of whose weights, biases and norms included, is the neutral value it starts with."""
    torch.manual_seed(11)
    model = STOCK[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def save_stock(name: str, tmp_path: Path) -> Path:
    directory = tmp_path / f"stock-{name}"
    make_stock(name).save_pretrained(directory)
    write_tokenizer(make_tokenizer(VOCAB_SIZE), directory)
    return directory


def recipe(directory: Path, *, length: int = LENGTH) -> FinetuneRecipe:
    return FinetuneRecipe(
        data=DataSection(path="nowhere", sequence_length=length),
        train=TrainSection(max_steps=1),
        init_from=str(directory),
        lora=EVERYWHERE,
    )


def adapted(directory: Path, section: LoraSection = EVERYWHERE, *, seed: int = 1) -> PeftModel:
    return add_adapters(load_base(recipe(directory), make_tokenizer(VOCAB_SIZE)), section, seed=seed)


def disturb(model: PeftModel) -> PeftModel:
    """Gives the adapters weights that do something, as if they were trained."""
    torch.manual_seed(5)
    with torch.no_grad():
        for tensor in adapter_weights(model).values():
            tensor.normal_(0, 0.2)
    return model.eval()


def tokens(rows: int = 2, length: int = 12, *, seed: int = 3) -> torch.Tensor:
    return torch.randint(2, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def train_steps(model: PeftModel, optimizers: list, steps: range) -> None:
    """As the loop calls the model, on batches that depend on the step alone."""
    model.train()
    for step in steps:
        ids = tokens(seed=100 + step)
        loss = model(
            input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(22.0), return_logits=False, use_cache=False
        ).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def adapted_layers(model: PeftModel) -> set[str]:
    return {name.split(".lora_")[0].rpartition(".")[2] for name in adapter_weights(model)}
