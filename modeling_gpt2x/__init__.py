"""The GPT2X model for transformers: importing it registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_gpt2x import GPT2XConfig
from .linear_gpt2x import chunked_linear_cross_entropy
from .modeling_gpt2x import (
    GPT2XForCausalLM,
    GPT2XForSequenceClassification,
    GPT2XForTokenClassification,
    GPT2XModel,
    GPT2XPreTrainedModel,
)

AutoConfig.register("gpt2x", GPT2XConfig)
AutoModel.register(GPT2XConfig, GPT2XModel)
AutoModelForCausalLM.register(GPT2XConfig, GPT2XForCausalLM)
AutoModelForSequenceClassification.register(GPT2XConfig, GPT2XForSequenceClassification)
AutoModelForTokenClassification.register(GPT2XConfig, GPT2XForTokenClassification)
# What makes save_pretrained copy this code beside the weights.
GPT2XConfig.register_for_auto_class()
GPT2XModel.register_for_auto_class("AutoModel")
GPT2XForCausalLM.register_for_auto_class("AutoModelForCausalLM")
GPT2XForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
GPT2XForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "GPT2XConfig",
    "GPT2XForCausalLM",
    "GPT2XForSequenceClassification",
    "GPT2XForTokenClassification",
    "GPT2XModel",
    "GPT2XPreTrainedModel",
    "chunked_linear_cross_entropy",
]
