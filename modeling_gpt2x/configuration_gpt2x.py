"""The options of a GPT2X model. Defaults are GPT-2 124M exactly; every modern part is one option."""

import difflib
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

if TYPE_CHECKING:
    FilledInt = Any
    FilledNames = Any
else:
    # May be given as None; whoever reads the config finds the value that None stands for.
    FilledInt = int | None
    FilledNames = list[str] | None

# The newest transformers that the tests run on: tests/constraints-newest.txt in gpt2x's repository.
NEWEST_TESTED = "5.24"

CHOICES = {
    "position_embedding": ("learned", "rope"),
    "norm": ("layer_norm", "rms_norm", "rms_norm_weightless"),
    "qk_norm": ("none", "weight", "weightless"),
    "residual_init": ("scaled", "zero"),
}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
LAYER_TYPES = ("full_attention", "sliding_attention")

# Keys which transformers reads or writes although they are no dataclass fields of PreTrainedConfig.
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
TRANSFORMERS_KEYS = (
    *("attn_implementation", "auto_map", "custom_pipelines", "experts_implementation", "is_causal", "model_type"),
    *("quantization_config", "tie_last_hidden_states", *ROPE_KEYS),
)


@strict
class GPT2XConfig(PreTrainedConfig):
    r"""Configuration of `GPT2XModel` and `GPT2XForCausalLM`.

    Without arguments it is GPT-2 124M (Radford et al., 2019), dropouts 0. GPT-2's own names are understood too.

    Args:
        vocab_size: number of tokens; rows of the embedding and of the head.
        hidden_size: width C of the residual stream.
        intermediate_size: width of the MLP; `None` means 4 * hidden_size.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key/value heads (arXiv:2305.13245); `None` means as many as query heads.
        head_dim: width of one head; `None` means hidden_size / num_attention_heads.
        max_position_embeddings: longest sequence of learned positions; with RoPE the training length.
        position_embedding: `learned` (GPT-2) or `rope` (arXiv:2104.09864).
        norm: `layer_norm` (arXiv:1607.06450), `rms_norm` (arXiv:1910.07467) or `rms_norm_weightless` (NanoChat).
        norm_eps: epsilon of every norm.
        hidden_act: a name of transformers' ACT2FN: `gelu_new`, `silu`, `relu2` (arXiv:2109.08668), ...
        gated_mlp: whether the MLP is act(gate(x)) * up(x) (arXiv:2002.05202).
        attention_bias, mlp_bias: whether their projections have biases.
        qk_norm: RMSNorm of queries and keys per head: `none`, `weight` (arXiv:2505.09388) or `weightless` (NanoChat).
        embedding_norm: whether the embeddings are normalized before the first layer.
        final_logit_softcapping: cap c in c * tanh(logits / c) (arXiv:2408.00118); `None` is off.
        tie_word_embeddings: whether the head shares the embedding's weight (arXiv:1608.05859).
        layer_types: `full_attention` or `sliding_attention` per layer; `None` is full attention everywhere.
        sliding_window: positions which a token of a `sliding_attention` layer sees, itself included.
        rope_parameters: transformers' RoPE dict (`rope_type`, `rope_theta`, ...); exists only with RoPE.
        attention_dropout, embedding_dropout: of the attention weights, and of the embeddings.
        hidden_dropout: of what attention and MLP add to the residual stream.
        initializer_range: standard deviation of the initial weights.
        residual_init: of `o_proj` and `down_proj`: `scaled` by 1 / sqrt(2 * num_hidden_layers) as in GPT-2, or `zero`.
        use_cache: whether the model returns a cache by default.

    Raises:
        ValueError: for options which contradict each other; the message names the rule and the remedy.
    """

    model_type = "gpt2x"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_ctx": "max_position_embeddings",
        "n_inner": "intermediate_size",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "norm_eps",
        "rms_norm_eps": "norm_eps",
        "attn_pdrop": "attention_dropout",
        "resid_pdrop": "hidden_dropout",
        "embd_pdrop": "embedding_dropout",
    }
    base_model_pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: FilledInt = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: FilledInt = None
    head_dim: FilledInt = None
    max_position_embeddings: int = 1024
    position_embedding: str = "learned"
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    hidden_act: str = "gelu_new"
    gated_mlp: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    qk_norm: str = "none"
    embedding_norm: bool = False
    final_logit_softcapping: float | int | None = None
    tie_word_embeddings: bool = True
    layer_types: FilledNames = None
    sliding_window: int | None = None
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    initializer_range: float = 0.02
    residual_init: str = "scaled"
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for old_name in [name for name in kwargs if name in self.attribute_map]:
            setattr(self, old_name, kwargs.pop(old_name))
        self._check_values()
        self._fill_defaults()
        self._check_together()
        self._take_rope_parameters(kwargs)
        # of this object, not of its class: transformers adds to it and never saves it
        self.base_model_tp_plan = self._tensor_parallel_plan()
        _warn_about_unknown_keys(kwargs, type(self))
        super().__post_init__(**kwargs)
        if self.position_embedding == "rope":
            factor = self.rope_parameters.get("partial_rotary_factor", 1.0)
            rule = f"rope_parameters.partial_rotary_factor ({factor}) must be 1, as GPT2X turns whole heads; drop it."
            _require(factor == 1.0, rule)

    def _check_values(self) -> None:
        for name, choices in CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        _check_choice("hidden_act", self.hidden_act, ACT2FN, "a name of transformers' ACT2FN")
        for name in ("attention_dropout", "hidden_dropout", "embedding_dropout"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} ({value}) must be at least 0 and below 1; use 0.0 to switch it off.")
        for name in SIZES:
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} ({value}) must be at least 1; set it to a positive number.")
        cap = self.final_logit_softcapping
        _require(cap is None or cap > 0, f"final_logit_softcapping ({cap}) must be positive; use None for no cap.")

    def _fill_defaults(self) -> None:
        """Replaces each `None` by the value it stands for."""
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.layer_types is None:
            # Not left None: generation with a static cache reads the list wherever the attribute exists.
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.head_dim is None:
            _require(
                self.hidden_size % self.num_attention_heads == 0,
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads "
                f"({self.num_attention_heads}); set head_dim or change one of them.",
            )
            self.head_dim = self.hidden_size // self.num_attention_heads

    def _check_together(self) -> None:
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
            f"({self.num_key_value_heads}); change one of them, or drop num_key_value_heads.",
        )
        _require(
            self.position_embedding != "rope" or self.head_dim % 2 == 0,
            f"head_dim ({self.head_dim}) must be even, as RoPE turns pairs; change head_dim or use "
            "position_embedding='learned'.",
        )
        for name in self.layer_types:
            rule = f"layer_types contains {name!r}; each entry must be one of {', '.join(LAYER_TYPES)}."
            _require(name in LAYER_TYPES, rule)
        _require(
            len(self.layer_types) == self.num_hidden_layers,
            f"layer_types has {len(self.layer_types)} entries but num_hidden_layers is {self.num_hidden_layers}; "
            "give one entry per layer.",
        )
        window, slides = self.sliding_window, "sliding_attention" in self.layer_types
        _require(
            not slides or (window is not None and window >= 1),
            f"sliding_window ({window}) must be at least 1 where layer_types has 'sliding_attention'; set "
            "sliding_window.",
        )
        if window is not None and not slides:
            # No error, as in Qwen3's configs: transformers sets it on any config that has the field.
            message = (
                f"sliding_window ({window}) has no effect without a 'sliding_attention' entry in layer_types; add one "
                "or drop sliding_window."
            )
            warnings.warn(message, UserWarning, stacklevel=4)

    def _take_rope_parameters(self, kwargs: dict[str, Any]) -> None:
        """Sets `rope_parameters` if RoPE is on. transformers fills in a default wherever the attribute exists."""
        if self.position_embedding == "rope":
            self.rope_parameters = dict(kwargs.pop("rope_parameters", None) or {})
            rope_type = self.rope_parameters.get("rope_type", "default")
            _check_choice("rope_parameters.rope_type", rope_type, ("default", *ROPE_INIT_FUNCTIONS))
            return
        for name in ROPE_KEYS:
            _require(
                kwargs.pop(name, None) is None,
                f"{name} needs position_embedding='rope', but position_embedding is {self.position_embedding!r}; set "
                f"it, or drop {name}.",
            )

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """How tensor parallelism splits the projections which this model has."""
        attention, mlp = "layers.*.self_attn", "layers.*.mlp"
        plan = {f"{attention}.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")}
        plan |= {f"{mlp}.{name}": "colwise" for name in (("gate_proj", "up_proj") if self.gated_mlp else ("up_proj",))}
        if self.qk_norm == "weight":
            plan |= {f"{attention}.{name}": "replicated_with_grad_allreduce" for name in ("q_norm", "k_norm")}
        return {**plan, f"{attention}.o_proj": "rowwise", f"{mlp}.down_proj": "rowwise"}


def _require(is_right: bool, rule: str) -> None:
    if not is_right:
        raise ValueError(rule)


def _check_choice(name: str, value: Any, choices: Iterable[str], rule: str | None = None) -> None:
    if value not in choices:
        rule = rule or f"one of {', '.join(choices)}"
        raise ValueError(f"{name} ({value!r}) must be {rule}{_nearest(value, choices)}")


def _warn_about_unknown_keys(kwargs: dict[str, Any], config_class: type[GPT2XConfig]) -> None:
    """Warns about keys which neither GPT2XConfig nor transformers understands; it would keep them silently."""
    fields = config_class.__dataclass_fields__
    # transformers still accepts generation parameters in old configs, and drops them.
    known = {*dir(config_class), *fields, *GenerationConfig().to_dict(), *TRANSFORMERS_KEYS}
    for name in kwargs:
        if not name.startswith("_") and name not in known:
            nearest = _nearest(name, (*GPT2XConfig.__annotations__, *GPT2XConfig.attribute_map, "rope_parameters"))
            message = f"GPT2XConfig has no option {name!r}; it has no effect{nearest}"
            warnings.warn(message, UserWarning, stacklevel=4)


def _nearest(name: Any, names: Iterable[str]) -> str:
    """The end of an error message: the valid name closest to `name`, or a full stop."""
    matches = difflib.get_close_matches(str(name), list(names), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "."


def warn_of_untested(version: str) -> None:
    """Says once that nobody tried this version of transformers; in the log, which nobody turns into errors."""
    minor, newest = ([int(part) for part in text.split(".")[:2]] for text in (version, NEWEST_TESTED))
    if minor > newest:
        logging.get_logger("transformers").warning_once(
            f"GPT2X is tested with transformers up to {NEWEST_TESTED}, and this is {version}; "
            f"if a result looks wrong, compare it with that of transformers {NEWEST_TESTED}."
        )


warn_of_untested(transformers.__version__)
