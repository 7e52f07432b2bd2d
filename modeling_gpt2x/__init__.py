"""The GPT2X model for transformers: importing it registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_gpt2x import GPT2XConfig
from .modeling_gpt2x import (
    GPT2XForCausalLM,
    GPT2XForSequenceClassification,
    GPT2XForTokenClassification,
    GPT2XModel,
    GPT2XPreTrainedModel,
)

# The second of each pair is what makes save_pretrained copy this code beside the weights.
AutoConfig.register("gpt2x", GPT2XConfig)
GPT2XConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, GPT2XModel),
    (AutoModelForCausalLM, GPT2XForCausalLM),
    (AutoModelForSequenceClassification, GPT2XForSequenceClassification),
    (AutoModelForTokenClassification, GPT2XForTokenClassification),
):
    auto_class.register(GPT2XConfig, model_class)
    model_class.register_for_auto_class(auto_class.__name__)

__all__ = [
    "GPT2XConfig",
    "GPT2XForCausalLM",
    "GPT2XForSequenceClassification",
    "GPT2XForTokenClassification",
    "GPT2XModel",
    "GPT2XPreTrainedModel",
]
