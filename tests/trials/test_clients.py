"""Libraries that train and adapt transformers models, on GPT2X: PEFT, torchao, Trainer and TRL.

What is not installed is skipped; see setup.cfg for the extras.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from gpt2x import save_stock
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

pytestmark = [pytest.mark.trial, pytest.mark.filterwarnings("ignore")]
MODERN: dict[str, Any] = {
    "position_embedding": "rope",
    "norm": "rms_norm",
    "hidden_act": "silu",
    "gated_mlp": True,
    "attention_bias": False,
    "mlp_bias": False,
    "qk_norm": "weight",
    "num_key_value_heads": 2,
}
LENGTH = 16


def make_model(**options: Any) -> GPT2XForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 64}
    return GPT2XForCausalLM(GPT2XConfig(**sizes, **tokens, **options))


def make_rows(count: int) -> list[list[int]]:
    """Rows that count upwards from anywhere, which a model learns in a few steps."""
    return [[2 + (start + i) % 60 for i in range(LENGTH)] for start in range(count)]


def arguments(directory: Path, *, rows: int, accumulation: int, kind: type = TrainingArguments, **more: Any) -> Any:
    return kind(
        output_dir=str(directory),
        max_steps=20,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        learning_rate=3e-3,  # larger ones let rounding grow to a percent within twenty steps of Adam
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        seed=0,
        disable_tqdm=True,
        **more,
    )


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, MODERN], ids=["gpt2", "modern"])
def test_twenty_steps_of_trainer_learn_alike_with_accumulation(options: dict, tmp_path: Path) -> None:
    # Rows of different lengths: a mean of means would differ between the two.
    rows = [
        {"input_ids": row, "labels": [-100] * (i % 11) + row[i % 11 :], "attention_mask": [1] * LENGTH}
        for i, row in enumerate(make_rows(160))
    ]
    whole, parts = (
        losses(Trainer(make_model(**options), arguments(tmp_path, rows=8 // n, accumulation=n), train_dataset=rows))
        for n in (1, 4)
    )
    assert len(whole) == 20
    assert whole[-1] < 0.85 * whole[0]
    assert parts == pytest.approx(whole, rel=1e-3)


def test_twenty_steps_of_trl_learn_alike_with_accumulation(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1", bos_token="w1")
    texts = Dataset.from_dict(
        {"text": [" ".join(f"w{i}" for i in row[: 6 + n % 9]) for n, row in enumerate(make_rows(160))]}
    )
    found = []
    for accumulation in (1, 4):
        config = arguments(
            tmp_path,
            rows=8 // accumulation,
            accumulation=accumulation,
            kind=trl.SFTConfig,
            max_length=LENGTH,
            dataset_text_field="text",
            gradient_checkpointing=False,
        )
        trainer = trl.SFTTrainer(make_model(**MODERN), config, train_dataset=texts, processing_class=tokenizer)
        found.append(losses(trainer))
    assert len(found[0]) == 20
    assert found[0][-1] < 0.85 * found[0][0]
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("options", [{}, MODERN], ids=["gpt2", "modern"])
def test_peft_adapts_every_projection_and_merges_back(options: dict, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[peft]'")
    base = make_model(**options)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    gate = {"gate_proj"} if options else set()
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"} | gate
    tokens = torch.tensor(make_rows(8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(20):
        loss = model(input_ids=tokens, labels=tokens, return_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[-1] < found[0] - 0.1
    model.eval()
    expected = model(input_ids=tokens).logits
    generated = model.generate(input_ids=tokens[:, :4], max_new_tokens=30, do_sample=False, eos_token_id=None)
    merged = model.merge_and_unload()
    assert type(merged) is GPT2XForCausalLM
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        merged.generate(tokens[:, :4], max_new_tokens=30, do_sample=False, eos_token_id=None), generated
    )
    save_stock(merged, tmp_path)


def test_torchao_quantizes_every_linear_to_int8() -> None:
    torchao = pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, tokens = make_model(**MODERN, tie_word_embeddings=False).eval(), torch.tensor(make_rows(4))
    expected = model(tokens).logits
    quantize_(model, Int8WeightOnlyConfig())
    quantized = [m for m in model.modules() if isinstance(m, nn.Linear) and type(m.weight) is not nn.Parameter]
    assert len(quantized) == 2 * 7 + 1, torchao.__version__
    logits = model(tokens).logits
    assert torch.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > 0.999
    assert not torch.equal(logits, expected)
    assert model.generate(tokens[:, :4], max_new_tokens=30, do_sample=False, eos_token_id=None).shape == (4, 34)
