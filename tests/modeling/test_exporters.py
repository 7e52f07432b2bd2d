"""transformers' exporters take a model as generation uses it: a program of the prompt, and one of a step."""

from typing import Any

import pytest
import torch
from stock_models import STOCK_MODELS, gpt2x_like, random_tokens
from transformers import DynamicCache
from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter

from modeling_gpt2x.context_gpt2x import CACHE_NAME

pytest.importorskip("transformers.exporters.runners", reason="what transformers exported before 5.23 does not run")
PROMPT = 6


def check(exporter: Any, config: Any, name: str) -> None:
    """Compares the logits of both programs with those of the stock class."""
    stock, tokens = STOCK_MODELS[name](), random_tokens(2, PROMPT + 1)
    model = gpt2x_like(stock)
    exported = exporter.export_for_generation(model, {"input_ids": tokens[:, :PROMPT]}, config).to("cpu")
    cache = DynamicCache(config=model.config)
    for stage, piece in (("prefill", slice(0, PROMPT)), ("decode", slice(PROMPT, PROMPT + 1))):
        inputs = {"input_ids": tokens[:, piece], "position_ids": torch.arange(PROMPT + 1)[piece].expand(2, -1)}
        logits = exported.runners[stage](**inputs, **{CACHE_NAME: cache}).logits
        with torch.no_grad():
            torch.testing.assert_close(logits, stock(tokens).logits[:, piece], rtol=1e-4, atol=1e-5)
            model(tokens[:, piece], **{CACHE_NAME: cache})


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_the_dynamo_exporter_takes_a_cached_step(name: str) -> None:
    check(DynamoExporter(), DynamoConfig(), name)


@pytest.mark.trial
@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
@pytest.mark.parametrize("is_dynamic", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_the_onnx_exporter_takes_a_cached_step(name: str, is_dynamic: bool) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    check(OnnxExporter(), OnnxConfig(dynamic=is_dynamic), name)
