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
from collections.abc import Callable
from functools import wraps
from os import PathLike
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, modeling_layers
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_gpt2x import GPT2XConfig
from .context_gpt2x import CACHE_NAME, CACHE_NAMES, grow_in_place, make_attention_masks, take_cache
from .linear_gpt2x import chunked_linear_cross_entropy, is_plain_linear, packed_linears, shift_left, to_matmul_dtype
from .loading_gpt2x import HUB_KWARGS, load_strictly

AUTO_MAP = {
    "AutoConfig": "configuration_gpt2x.GPT2XConfig",
    "AutoModel": "modeling_gpt2x.GPT2XModel",
    "AutoModelForCausalLM": "modeling_gpt2x.GPT2XForCausalLM",
    "AutoModelForSequenceClassification": "modeling_gpt2x.GPT2XForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_gpt2x.GPT2XForTokenClassification",
}


# ---------------------------------------------------------------------------------------------------------- norm
class GPT2XRMSNorm(nn.RMSNorm):
    """Root mean square norm over the last dimension (arXiv:1910.07467), with or without a learned weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        # Under CUDA's autocast the result is float32, and attention wants queries, keys and values of one dtype.
        return F.rms_norm(x, self.normalized_shape, weight, self.eps).to(x.dtype)


def make_norm(config: GPT2XConfig) -> nn.Module:
    """The norm of the residual stream which `config.norm` names."""
    if config.norm == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
    return GPT2XRMSNorm(config.hidden_size, config.norm_eps, elementwise_affine=config.norm == "rms_norm")


def make_qk_norm(config: GPT2XConfig) -> GPT2XRMSNorm | None:
    """The norm of each query's or key's head which `config.qk_norm` names."""
    has_weight = config.qk_norm == "weight"
    return None if config.qk_norm == "none" else GPT2XRMSNorm(config.head_dim, config.norm_eps, has_weight)


# -------------------------------------------------------------------------------------------------------- rotary
class GPT2XRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (arXiv:2104.09864), with every scaling that transformers knows.

    By the names of class, buffers and static method transformers re-creates the buffers of a model made on "meta".
    """

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: GPT2XConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
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
        self.q_norm, self.k_norm = make_qk_norm(config), make_qk_norm(config)

    def forward(
        self,
        x_BTC: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T, _ = x_BTC.shape
        q_BTHD = self.q_proj(x_BTC).view(B, T, -1, self.head_dim)
        k_BTKD = self.k_proj(x_BTC).view(B, T, -1, self.head_dim)
        v_BTKD = self.v_proj(x_BTC).view(B, T, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        if position_embeddings is not None:
            q_BTHD, k_BTKD = rotate(q_BTHD, *position_embeddings), rotate(k_BTKD, *position_embeddings)

        q_BHTD, k_BKSD, v_BKSD = q_BTHD.transpose(1, 2), k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)
        if past_key_values is not None:
            k_BKSD, v_BKSD = past_key_values.update(k_BKSD, v_BKSD, self.layer_idx, kwargs=kwargs)
        kwargs |= {"scaling": self.scaling, "sliding_window": self.sliding_window}
        kwargs["dropout"] = self.attention_dropout if self.training else 0.0
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out_BTHD, weights_BHTS = attend(self, q_BHTD, k_BKSD, v_BKSD, attention_mask, **kwargs)
        return self.o_proj(out_BTHD.reshape(B, T, -1)), weights_BHTS


# --------------------------------------------------------------------------------------------------------- layer
class GPT2XDecoderLayer(modeling_layers.GradientCheckpointingLayer):
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

    def forward(
        self,
        x_BTC: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Further keyword arguments, position_ids among them, are those of the attention function."""
        h_BTC = to_matmul_dtype(self.input_layernorm(x_BTC))
        attended_BTC, _ = self.self_attn(h_BTC, attention_mask, position_embeddings, past_key_values, **kwargs)
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
        """GPT-2's initialization: biases 0, weights of norms 1, all else normal of mean 0 and this standard deviation:

        embed_tokens, embed_positions, lm_head, score   initializer_range
        q_proj, k_proj, v_proj, gate_proj, up_proj      initializer_range
        o_proj, down_proj                               initializer_range / sqrt(2 * num_hidden_layers)
        o_proj, down_proj, where residual_init is zero  0
        """
        super()._init_weights(module)
        if getattr(module, "is_residual_projection", False):
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
        """Loads a gpt2x model; where gpt2x is installed, also a stock one of type gpt2, llama, qwen3 or nanochat.

        Arguments are those of transformers; options of GPT2XConfig may be among them.

        Raises:
            ValueError: for other types, stock options which GPT2X lacks, and what is damaged or holds other tensors.
        """
        name, loaded = pretrained_model_name_or_path, None
        wants_loading = kwargs.pop("output_loading_info", False)
        if name is not None and config is None:
            hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS & kwargs.keys()}
            model_type = PreTrainedConfig.get_config_dict(name, **hub_kwargs)[0].get("model_type")
            if model_type != cls.config_class.model_type:
                try:
                    from gpt2x.stock_forms import load_stock
                except ImportError as error:
                    raise ValueError(
                        f"{name} is a {model_type} model and no gpt2x one; install the package gpt2x, which converts "
                        "stock models, or load it with AutoModelForCausalLM."
                    ) from error
                loaded = load_stock(cls, name, **kwargs)
        if loaded is None:
            kwargs |= {"config": config, "heads": cls._heads_of_tasks}
            loaded = load_strictly(super().from_pretrained, name, *model_args, **kwargs)
        return loaded if wants_loading else loaded[0]

    def save_pretrained(self, save_directory: str | PathLike, **kwargs: Any) -> None:
        """Saves the gpt2x form with its code; arguments are those of transformers. See also gpt2x.save_stock."""
        # transformers writes the entry of the saved class only; vLLM and SGLang build through AutoModel.
        self.config.auto_map = {**AUTO_MAP, **(getattr(self.config, "auto_map", None) or {})}
        super().save_pretrained(save_directory, **kwargs)


class GPT2XModel(GPT2XPreTrainedModel):
    """The decoder without its head: token ids to hidden states."""

    def __init__(self, config: GPT2XConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        has_rope, num_learned = config.position_embedding == "rope", config.max_position_embeddings
        self.embed_positions = None if has_rope else nn.Embedding(num_learned, config.hidden_size)
        self.rotary_emb = GPT2XRotaryEmbedding(config) if has_rope else None
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
            position_ids: (B, T) or (1, T), restarting at each packed document; `None` counts on from the cache.
            past_key_values: the keys and values of the S - T positions before; `cache` is the same by its newer name.
            inputs_embeds: (B, T, C) in place of `input_ids`.
            use_cache: whether to return a cache.

        Raises:
            ValueError: for both or none of `input_ids` and `inputs_embeds`, or for more tokens than learned positions.
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
        # Layers which are computed a second time, for their gradients, would write to a cache twice.
        is_recomputed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer, layer_type in zip(self.layers, self.config.layer_types):
            x_BTC = layer(
                x_BTC,
                attention_mask=masks[layer_type],
                position_embeddings=position_embeddings,
                past_key_values=None if is_recomputed else cache,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTC), **{CACHE_NAME: cache})

    def _embed_positions(
        self, x_BTC: torch.Tensor, position_ids: torch.Tensor | None, cache: Cache | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Adds learned positions to the embeddings, or computes cosines and sines once for all layers."""
        if position_ids is None:
            T, num_learned = x_BTC.shape[1], self.config.max_position_embeddings
            if self.embed_positions is not None and num_learned < T:
                raise ValueError(
                    f"The sequence has {T} tokens but max_position_embeddings is {num_learned}; shorten it, or use "
                    "position_embedding='rope'."
                )
            num_past = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(T, device=x_BTC.device) + num_past).unsqueeze(0)
        if self.embed_positions is not None:
            x_BTC = x_BTC + self.embed_positions(position_ids)
        like = to_matmul_dtype(x_BTC[:1, :1, :1])
        position_embeddings = None if self.rotary_emb is None else self.rotary_emb(like, position_ids)
        return x_BTC if self.embedding_norm is None else self.embedding_norm(x_BTC), position_embeddings


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
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
            kwargs: `num_items_in_batch` divides the summed loss; `shift_labels` (B, T) are shifted labels.

        Raises:
            ValueError: if `return_logits` is `False` and there are no labels.
        """
        past_key_values = take_cache(past_key_values, kwargs)
        shift_labels = kwargs.get("shift_labels")
        if shift_labels is None and labels is not None:
            shift_labels = shift_left(labels)
        has_labels = shift_labels is not None
        if not (has_labels or return_logits):
            raise ValueError("return_logits=False leaves nothing to return without labels; give labels.")
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
        hidden_BTC, softcap, loss, logits = outputs.last_hidden_state, self.config.final_logit_softcapping, None, None
        if return_logits or not is_plain_linear(self.lm_head) or self.lm_head.bias is not None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_BTC[:, keep])[..., : self.config.vocab_size]  # behind it are padding rows
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            if has_labels:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        elif shift_labels is not None:
            loss = chunked_linear_cross_entropy(
                hidden_BTC,
                self.lm_head.weight,
                shift_labels,
                softcap=softcap,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
                vocab_size=self.config.vocab_size,
            )
        recorded = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits if return_logits else None, **recorded)

    @wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        cache = take_cache(kwargs.pop("past_key_values", None), kwargs)
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        with packed_linears(self):
            return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> None:
        given = model_kwargs.get(CACHE_NAME)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if given is None and self.device.type == "cpu":
            grow_in_place(model_kwargs.get(CACHE_NAME))


# --------------------------------------------------------------------------------------------------- classifiers
class GPT2XForSequenceClassification(modeling_layers.GenericForSequenceClassification, GPT2XPreTrainedModel):
    """GPT2X with one score per class, read at the last token that is no padding (`pad_token_id`)."""

    def __init__(self, config: GPT2XConfig):
        # Not the generic class's own: it asks AutoModel, which knows no code that came from the Hub.
        GPT2XPreTrainedModel.__init__(self, config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.model = GPT2XModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class GPT2XForTokenClassification(modeling_layers.GenericForTokenClassification, GPT2XPreTrainedModel):
    """GPT2X with one score per class and token, after a dropout of `hidden_dropout`."""

    def __init__(self, config: GPT2XConfig):
        GPT2XPreTrainedModel.__init__(self, config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.model = GPT2XModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
