"""GPT2X: GPT-2 (Radford et al., 2019) and its modern successors in one decoder.

Read from top to bottom: norm, rotary positions, MLP, attention, layer, GPT2XModel, GPT2XForCausalLM, classifiers.

Tensors wear their shape as a suffix, so that q_BTHD is a tensor of shape (B, T, H, D):

    B  batch                            H  query heads (num_attention_heads)
    T  positions of this forward pass   K  key/value heads (num_key_value_heads)
    S  positions seen, cache included   D  width of one head (head_dim)
    C  residual stream (hidden_size)    E  D / 2, the pairs which RoPE turns
    F  MLP (intermediate_size)          V  vocabulary (vocab_size)
"""

import math
from collections.abc import Callable, Mapping
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_gpt2x import CACHE_NAME, CACHE_NAMES, grow_in_place, take_cache
from .configuration_gpt2x import GPT2XConfig
from .conversion_gpt2x import (
    STOCK_CLASSES,
    check_model_type,
    from_stock_config,
    from_stock_state_dict,
    save_config,
    to_stock_config,
    to_stock_state_dict,
)
from .import_gpt2x import read_nanogpt
from .loading_gpt2x import load_strictly
from .loss_gpt2x import chunked_linear_cross_entropy, shift_labels_left
from .masks_gpt2x import make_attention_masks
from .packed_gpt2x import packed_linears

AUTO_MAP = {
    "AutoConfig": "configuration_gpt2x.GPT2XConfig",
    "AutoModel": "modeling_gpt2x.GPT2XModel",
    "AutoModelForCausalLM": "modeling_gpt2x.GPT2XForCausalLM",
    "AutoModelForSequenceClassification": "modeling_gpt2x.GPT2XForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_gpt2x.GPT2XForTokenClassification",
}
# Arguments of from_pretrained that say where a checkpoint lies.
HUB_KWARGS = (
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"),
    *("use_safetensors", "variant", "weights_only"),
)


# ---------------------------------------------------------------------------------------------------------- norm
class GPT2XRMSNorm(nn.Module):
    """Root mean square norm over the last dimension (arXiv:1910.07467), with or without a learned weight."""

    def __init__(self, size: int, eps: float, has_weight: bool = True):
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if has_weight else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        # Under CUDA's autocast the result is float32, and attention wants queries, keys and values of one dtype.
        return F.rms_norm(x, (self.size,), weight, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}, has_weight={self.weight is not None}"


def make_norm(config: GPT2XConfig) -> nn.Module:
    """The norm of the residual stream which `config.norm` names."""
    if config.norm == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
    return GPT2XRMSNorm(config.hidden_size, config.norm_eps, has_weight=config.norm == "rms_norm")


def to_matmul_dtype(x: torch.Tensor) -> torch.Tensor:
    """Casts once to the autocast dtype, where autocast would cast again for every projection reading `x`."""
    device_type = x.device.type
    return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x


# -------------------------------------------------------------------------------------------------------- rotary
class GPT2XRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (arXiv:2104.09864), with every scaling that transformers knows.

    The class name, the names of the buffers and the static method are what transformers re-creates the buffers by
    after a model was built on the meta device.
    """

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: GPT2XConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        compute = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq_E, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", inv_freq_E, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq_E.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: GPT2XConfig, **kwargs: Any) -> tuple[torch.Tensor, float]:
        """Returns the (E,) angles per position of unscaled RoPE, and the factor 1 for cosines and sines."""
        exponents_E = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents_E, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cos_BT1E and sin_BT1E in the dtype of `x`; the angles are float32."""
        angles_BT1E = position_ids[:, :, None, None].float() * self.inv_freq.float()
        cos_BT1E = angles_BT1E.cos() * self.attention_scaling
        sin_BT1E = angles_BT1E.sin() * self.attention_scaling
        return cos_BT1E.to(x.dtype), sin_BT1E.to(x.dtype)


def rotate(x_BTHD: torch.Tensor, cos_BT1E: torch.Tensor, sin_BT1E: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (x[e], x[e + E]) by their angles, in the order of Llama's weights."""
    a_BTHE, b_BTHE = x_BTHD.chunk(2, dim=-1)
    return torch.cat((a_BTHE * cos_BT1E - b_BTHE * sin_BT1E, b_BTHE * cos_BT1E + a_BTHE * sin_BT1E), dim=-1)


# ----------------------------------------------------------------------------------------------------------- mlp
class GPT2XMLP(nn.Module):
    """down(act(up(x))), or the gated down(act(gate(x)) * up(x)) of arXiv:2002.05202."""

    def __init__(self, config: GPT2XConfig):
        super().__init__()
        C, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, F_, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(C, F_, bias=config.mlp_bias)
        self.down_proj = nn.Linear(F_, C, bias=config.mlp_bias)
        # transformers' gelu_new is the same function written in eight operations.
        self.act_fn = ACT2FN["gelu_pytorch_tanh" if config.hidden_act == "gelu_new" else config.hidden_act]

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x_BTC)))
        return self.down_proj(self.act_fn(self.gate_proj(x_BTC)) * self.up_proj(x_BTC))


# ----------------------------------------------------------------------------------------------------- attention
def eager_attention_forward(
    module: "GPT2XAttention",
    q_BHTD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out (arXiv:1706.03762), softmax in float32; returns out_BTHD and the weights_BHTS."""
    k_BHSD = k_BKSD.repeat_interleave(module.num_key_value_groups, dim=1)
    v_BHSD = v_BKSD.repeat_interleave(module.num_key_value_groups, dim=1)
    scores_BHTS = q_BHTD @ k_BHSD.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BHTS = scores_BHTS + attention_mask
    weights_BHTS = F.softmax(scores_BHTS, dim=-1, dtype=torch.float32).to(q_BHTD.dtype)
    weights_BHTS = F.dropout(weights_BHTS, p=dropout, training=module.training)
    return (weights_BHTS @ v_BHSD).transpose(1, 2).contiguous(), weights_BHTS


class GPT2XAttention(nn.Module):
    """Causal self-attention, multi-head or grouped-query (arXiv:2305.13245), with optional QK-norm and RoPE."""

    def __init__(self, config: GPT2XConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        is_sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if is_sliding else None

        C, bias = config.hidden_size, config.attention_bias
        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(C, q_size, bias=bias)
        self.k_proj = nn.Linear(C, kv_size, bias=bias)
        self.v_proj = nn.Linear(C, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, C, bias=bias)
        if config.qk_norm != "none":
            self.q_norm = GPT2XRMSNorm(self.head_dim, config.norm_eps, has_weight=config.qk_norm == "weight")
            self.k_norm = GPT2XRMSNorm(self.head_dim, config.norm_eps, has_weight=config.qk_norm == "weight")

    def forward(
        self,
        x_BTC: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T, _ = x_BTC.shape
        q_BTHD = self.q_proj(x_BTC).view(B, T, -1, self.head_dim)
        k_BTKD = self.k_proj(x_BTC).view(B, T, -1, self.head_dim)
        v_BTKD = self.v_proj(x_BTC).view(B, T, -1, self.head_dim)
        if self.config.qk_norm != "none":
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        if position_embeddings is not None:
            q_BTHD, k_BTKD = rotate(q_BTHD, *position_embeddings), rotate(k_BTKD, *position_embeddings)

        q_BHTD, k_BKSD, v_BKSD = q_BTHD.transpose(1, 2), k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)
        cache = kwargs.pop(CACHE_NAME, None)
        if cache is not None:
            k_BKSD, v_BKSD = cache.update(k_BKSD, v_BKSD, self.layer_idx, kwargs=kwargs)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out_BTHD, weights_BHTS = attention(
            self,
            q_BHTD,
            k_BKSD,
            v_BKSD,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(out_BTHD.reshape(B, T, -1)), weights_BHTS


# --------------------------------------------------------------------------------------------------------- layer
class GPT2XDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPT2XConfig, layer_idx: int):
        super().__init__()
        self.self_attn = GPT2XAttention(config, layer_idx)
        self.mlp = GPT2XMLP(config)
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)
        self.hidden_dropout = config.hidden_dropout
        # A mark on the leaf: transformers initializes no parameter of a container's child on external code.
        self.self_attn.o_proj.is_residual_projection = True  # type: ignore[assignment]
        self.mlp.down_proj.is_residual_projection = True  # type: ignore[assignment]

    def forward(self, x_BTC: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Keyword arguments, among them mask, cache and positions, go to the attention."""
        attended_BTC, _ = self.self_attn(to_matmul_dtype(self.input_layernorm(x_BTC)), **kwargs)
        x_BTC = x_BTC + F.dropout(attended_BTC, self.hidden_dropout, self.training)
        mlp_BTC = self.mlp(to_matmul_dtype(self.post_attention_layernorm(x_BTC)))
        return x_BTC + F.dropout(mlp_BTC, self.hidden_dropout, self.training)


# --------------------------------------------------------------------------------------------------------- model
class GPT2XPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about every GPT2X model."""

    config: GPT2XConfig
    config_class = GPT2XConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["GPT2XDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # What a checkpoint may lack or have too much: it is of the same body, and of another task.
    _heads_of_tasks: ClassVar[tuple[str, ...]] = ("lm_head.", "score.")
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": GPT2XDecoderLayer,
        "attentions": GPT2XAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's initialization; the projections that write to the residual stream are scaled down, or zero."""
        super()._init_weights(module)
        if not getattr(module, "is_residual_projection", False):
            return
        if self.config.residual_init == "zero":
            init.zeros_(module.weight)
        else:
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike | None,
        *model_args: Any,
        config: PreTrainedConfig | str | PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a gpt2x model, or converts a stock one of type gpt2, llama, qwen3 or nanochat.

        Arguments are those of transformers; options of GPT2XConfig may be among them.

        Raises:
            ValueError: for any other model type, for options of the stock model which GPT2X lacks, and for checkpoints
                that are damaged or hold other tensors than the model.
        """
        wants_loading = kwargs.pop("output_loading_info", False)
        if pretrained_model_name_or_path is not None and config is None:
            hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
            config_dict, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_kwargs)
            if config_dict.get("model_type") != cls.config_class.model_type:
                check_model_type(config_dict.get("model_type"))
                loaded = cls._from_stock(pretrained_model_name_or_path, hub_kwargs, **kwargs)
                return loaded if wants_loading else loaded[0]
        loaded = load_strictly(
            super().from_pretrained,
            pretrained_model_name_or_path,
            *model_args,
            heads=cls._heads_of_tasks,
            config=config,
            **kwargs,
        )
        return loaded if wants_loading else loaded[0]

    @classmethod
    def _from_stock(
        cls, name_or_path: str | PathLike, hub_kwargs: dict[str, Any], **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Loads the stock class and hands its converted weights to a GPT2X model, both on the CPU."""
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", "auto"))
        load = AutoModelForCausalLM.from_pretrained
        stock, _ = load_strictly(load, name_or_path, dtype=dtype, trust_remote_code=False, **hub_kwargs)
        rest = {name: value for name, value in kwargs.items() if name not in hub_kwargs}
        options = from_stock_config(stock.config).to_dict()
        config, rest = cls.config_class.from_dict(options, return_unused_kwargs=True, **rest)
        state_dict = from_stock_state_dict(stock.state_dict(), from_stock_config(stock.config))
        rest |= {"source": name_or_path, "heads": cls._heads_of_tasks, "config": config, "state_dict": state_dict}
        model, loading = load_strictly(super().from_pretrained, None, dtype=stock.dtype, **rest)
        model.config.name_or_path = str(name_or_path)
        if model.can_generate():
            model.generation_config = stock.generation_config
        return model, loading

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:
        """Saves the gpt2x form with its code; arguments are those of transformers. See also `save_stock`."""
        # transformers writes the entry of the saved class only; vLLM and SGLang build through AutoModel.
        self.config.auto_map = {**AUTO_MAP, **(getattr(self.config, "auto_map", None) or {})}
        super().save_pretrained(save_directory, **kwargs)


class GPT2XModel(GPT2XPreTrainedModel):
    """The decoder without its head: token ids to hidden states."""

    def __init__(self, config: GPT2XConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary_emb = GPT2XRotaryEmbedding(config)
        self.embedding_norm = make_norm(config) if config.embedding_norm else None
        self.layers = nn.ModuleList([GPT2XDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Returns the normalized hidden states (B, T, C) of the last layer.

        Args:
            input_ids: (B, T) tokens; exactly one of this and `inputs_embeds`.
            attention_mask: (B, S), 1 for tokens and 0 for padding; or a mask already made, (B, 1, T, S).
            position_ids: (B, T) or (1, T), restarting at each document of a packed row; `None` counts on from the
                cache.
            past_key_values: the keys and values of the S - T positions before; `cache` is the same by its newer name.
            inputs_embeds: (B, T, C) in place of `input_ids`.
            use_cache: whether to return a cache.

        Raises:
            ValueError: if both or none of `input_ids` and `inputs_embeds` are given, both names of the cache, or fewer
                learned positions than tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("forward takes exactly one of input_ids and inputs_embeds; give one of them.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = take_cache(past_key_values, kwargs)
        masks = make_attention_masks(self.config, inputs_embeds, attention_mask, cache, position_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        x_BTC, position_embeddings = self._embed_positions(inputs_embeds, position_ids, cache)
        x_BTC = F.dropout(x_BTC, self.config.embedding_dropout, self.training)
        for layer, layer_type in zip(self.layers, self.config.layer_types):
            x_BTC = layer(
                x_BTC,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTC), **{CACHE_NAME: cache})

    def _embed_positions(
        self, x_BTC: torch.Tensor, position_ids: torch.Tensor | None, cache: Cache | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Adds learned positions to the embeddings, or computes cosines and sines once for all layers."""
        if position_ids is None:
            T, num_learned = x_BTC.shape[1], self.config.max_position_embeddings
            if self.config.position_embedding == "learned" and num_learned < T:
                raise ValueError(
                    f"The sequence has {T} tokens but max_position_embeddings is {num_learned}; shorten it, or use "
                    "position_embedding='rope'."
                )
            num_past = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(T, device=x_BTC.device) + num_past).unsqueeze(0)
        position_embeddings = None
        if self.config.position_embedding == "learned":
            x_BTC = x_BTC + self.embed_positions(position_ids)
        else:
            position_embeddings = self.rotary_emb(to_matmul_dtype(x_BTC[:1, :1, :1]), position_ids)
        if self.embedding_norm is not None:
            x_BTC = self.embedding_norm(x_BTC)
        return x_BTC, position_embeddings


class GPT2XForCausalLM(GPT2XPreTrainedModel, GenerationMixin):
    """GPT2X with its language modeling head."""

    _heads_of_tasks: ClassVar[tuple[str, ...]] = ()
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GPT2XConfig):
        super().__init__(config)
        self.model = GPT2XModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_nanogpt(
        cls, path: str | PathLike, *, num_attention_heads: int | None = None, hidden_act: str = "gelu"
    ) -> "GPT2XForCausalLM":
        """Loads a nanoGPT `ckpt.pt` or a bare state dict with GPT-2's names; see `read_nanogpt` for the arguments.

        Raises:
            ValueError: if it is none, holds more than tensors and plain values (nothing is executed), or leaves the
                number of heads open.
        """
        config, state_dict = read_nanogpt(path, num_attention_heads=num_attention_heads, hidden_act=hidden_act)
        return cls.from_pretrained(None, config=config, state_dict=state_dict, dtype=config.dtype)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Returns logits (B, T, V), and the loss of the next token where labels are given.

        Arguments are those of `GPT2XModel.forward`, and:

        Args:
            labels: (B, T) *unshifted* token ids, -100 where nothing is predicted; the model shifts them once.
            logits_to_keep: compute the logits of the last so many positions only (0: all), or of these indices.
            return_logits: `False` computes the loss without holding the logits, which are then `None`.
            kwargs: `num_items_in_batch` divides the summed loss; `shift_labels` (B, T) are labels already shifted.
                The rest goes to the attention.

        Raises:
            ValueError: if `return_logits` is `False` and there are no labels.
        """
        past_key_values = take_cache(past_key_values, kwargs)
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        if has_labels and use_cache is None and past_key_values is None:
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        loss, logits = None, None
        if not return_logits:
            loss = self._lean_loss(outputs.last_hidden_state, labels, **kwargs)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self._logits(outputs.last_hidden_state[:, keep])
            if has_labels:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    @wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        for name in CACHE_NAMES:
            if name in kwargs:
                kwargs[CACHE_NAME] = kwargs.pop(name)
        with packed_linears(self):
            return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> None:
        given = model_kwargs.get(CACHE_NAME)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if given is None and self.device.type == "cpu":
            grow_in_place(model_kwargs.get(CACHE_NAME))

    def save_stock(
        self,
        save_directory: str | PathLike,
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Writes config.json, model.safetensors and generation_config.json of the stock class, free of our code.

        Args:
            save_directory: where to; created if missing.
            state_dict: the whole model's weights, for a trainer that gathered them; `None` takes the model's own.
            dtype: of the weights in the file.

        Raises:
            ValueError: if no stock class expresses the model; it names the options that prevent it.
        """
        stock_config = to_stock_config(self.config)
        weights = to_stock_state_dict(self.state_dict() if state_dict is None else state_dict, self.config)
        stock_config.architectures = [STOCK_CLASSES[stock_config.model_type]]
        stock_config.dtype = dtype
        save_config(stock_config, save_directory)
        self.generation_config.save_pretrained(save_directory)
        weights = {name: weight.detach().to(dtype).contiguous() for name, weight in weights.items()}
        save_file(weights, Path(save_directory) / "model.safetensors", metadata={"format": "pt"})

    def _logits(self, hidden_BTC: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) with the soft cap (arXiv:2408.00118); padding rows of the head are cut off."""
        logits_BTV = self.lm_head(hidden_BTC)[..., : self.config.vocab_size]
        softcap = self.config.final_logit_softcapping
        return logits_BTV if softcap is None else torch.tanh(logits_BTV / softcap) * softcap

    def _lean_loss(
        self,
        hidden_BTC: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The loss without the logits. Heads that are more than a local weight go through their own forward."""
        if shift_labels is None:
            if labels is None:
                raise ValueError("return_logits=False leaves nothing to return without labels; give labels.")
            shift_labels = shift_labels_left(labels)
        if not is_plain_linear(self.lm_head):
            return self.loss_function(
                logits=self._logits(hidden_BTC),
                labels=None,
                vocab_size=self.config.vocab_size,
                shift_labels=shift_labels,
                num_items_in_batch=num_items_in_batch,
            )
        return chunked_linear_cross_entropy(
            hidden_BTC,
            self.lm_head.weight,
            shift_labels,
            softcap=self.config.final_logit_softcapping,
            num_items_in_batch=num_items_in_batch,
            vocab_size=self.config.vocab_size,
        )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` is x @ weight.T and nothing else: no LoRA, quantization, DTensor, bias or hooks."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or module.bias is not None:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


# --------------------------------------------------------------------------------------------------- classifiers
class GPT2XForSequenceClassification(GenericForSequenceClassification, GPT2XPreTrainedModel):
    """GPT2X with one score per class, read at the last token that is no padding (`pad_token_id`)."""

    def __init__(self, config: GPT2XConfig):
        # Not the generic class's own: it asks AutoModel, which knows no code that came from the Hub.
        GPT2XPreTrainedModel.__init__(self, config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.model = GPT2XModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class GPT2XForTokenClassification(GenericForTokenClassification, GPT2XPreTrainedModel):
    """GPT2X with one score per class and token, after a dropout of `hidden_dropout`."""

    def __init__(self, config: GPT2XConfig):
        GPT2XPreTrainedModel.__init__(self, config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.model = GPT2XModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "GPT2XForCausalLM",
    "GPT2XForSequenceClassification",
    "GPT2XForTokenClassification",
    "GPT2XModel",
    "GPT2XPreTrainedModel",
]
