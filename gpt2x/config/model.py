"""The architecture."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from gpt2x.config.checks import Range, Share, ShareBelowOne, Size, check_numbers


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The architecture: the fields of GPT2XConfig, whose defaults are GPT-2 124M."""

    vocab_size: Size | None = None
    """Number of token ids; by default the tokenizer's."""
    hidden_size: Size = 768
    """Width of the residual stream."""
    num_hidden_layers: Annotated[int, Range(least=1, most=10**4)] = 12
    """Number of transformer layers."""
    num_attention_heads: Annotated[int, Range(least=1, most=10**5)] = 12
    """Number of query heads."""
    num_key_value_heads: Annotated[int, Range(least=1, most=10**5)] | None = None
    """Number of key and value heads (GQA, arXiv:2305.13245); by default as many as query heads."""
    head_dim: Size | None = None
    """Width of one head; by default hidden_size / num_attention_heads."""
    intermediate_size: Size | None = None
    """Width inside the MLP; by default 4 * hidden_size."""
    max_position_embeddings: Size = 1024
    """Longest sequence the model takes, in tokens."""
    hidden_act: str = "gelu_new"
    """Activation of the MLP, a name of transformers' ACT2FN: gelu_new, silu, relu2, ..."""
    gated_mlp: bool = False
    """Whether the MLP is gated (SwiGLU with silu, arXiv:2002.05202)."""
    position_embedding: Literal["learned", "rope"] = "learned"
    """How positions enter: GPT-2's learned table, or rotary embeddings (arXiv:2104.09864)."""
    rope_parameters: dict[str, Any] | None = None
    """RoPE's rope_theta, rope_type and their scaling parameters; only with position_embedding: rope."""
    norm: Literal["layer_norm", "rms_norm", "rms_norm_weightless"] = "layer_norm"
    """Normalization: LayerNorm, RMSNorm (arXiv:1910.07467), or RMSNorm without a weight."""
    norm_eps: Share = 1e-5
    """Epsilon of every normalization."""
    qk_norm: Literal["none", "weight", "weightless"] = "none"
    """RMSNorm of queries and keys per head (arXiv:2010.04245)."""
    embedding_norm: bool = False
    """Whether the embeddings are normalized before the first layer."""
    attention_bias: bool = True
    """Whether the attention projections have biases."""
    mlp_bias: bool = True
    """Whether the MLP's projections have biases."""
    final_logit_softcapping: Annotated[float, Range(above=0, most=10**6)] | None = None
    """Logits are capped to c * tanh(logits / c) (arXiv:2408.00118); null for no cap."""
    tie_word_embeddings: bool = True
    """Whether the head shares its weight with the token embedding."""
    layer_types: list[str] | None = None
    """Per layer full_attention or sliding_attention; null for full attention everywhere."""
    sliding_window: Size | None = None
    """How many tokens a sliding layer sees."""
    initializer_range: Annotated[float, Range(least=0, most=100)] = 0.02
    """Standard deviation of the initial weights."""
    residual_init: Literal["scaled", "zero"] = "scaled"
    """Projections back into the residual stream start at GPT-2's 1/sqrt(2 * layers) of that, or at zero."""
    attention_dropout: ShareBelowOne = 0.0
    """Dropout of the attention weights."""
    hidden_dropout: ShareBelowOne = 0.0
    """Dropout of what each sublayer adds to the residual stream."""
    embedding_dropout: ShareBelowOne = 0.0
    """Dropout of the embeddings."""

    def __post_init__(self) -> None:
        check_numbers(self, "model.")
