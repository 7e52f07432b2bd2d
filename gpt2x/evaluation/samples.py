"""Texts that a model writes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from gpt2x.config import GenerationRecipe
from gpt2x.distributed.devices import forked_rng, without_cudnn_attention


def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
) -> list[str]:
    """Continues each prompt by nucleus sampling (arXiv:1904.09751).

    torch's random state is left as it was, so sampling during a run does not change the run.

    Args:
        model: a transformers model that generates.
        tokenizer: its tokenizer; an empty prompt starts from its end-of-text token.
        prompts: texts to continue.
        max_new_tokens: length of each continuation in tokens.
        seed: of the sampling.

    Returns:
        The continuations, without their prompts.
    """
    was_training = model.training
    model.eval()
    with forked_rng(model.device), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(seed)
        nucleus = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
        ids = [_continue(model, tokenizer, prompt, max_new_tokens, **nucleus) for prompt in prompts]
    model.train(was_training)
    return [tokenizer.decode(continuation, skip_special_tokens=True) for continuation in ids]


def stream_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, options: GenerationRecipe
) -> None:
    """Prints the continuation of a prompt while it is being written."""
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = sampling_arguments(options)
    _continue(model, tokenizer, prompt, options.max_new_tokens, **sampling, streamer=streamer)


def generate(model: PreTrainedModel, input_ids: Tensor, **options: Any) -> Any:
    """What the model's generate returns for rows (B, T) without padding."""
    with without_cudnn_attention():
        return model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)


def sampling_arguments(options: GenerationRecipe) -> dict[str, Any]:
    """What generate() is told about how to choose tokens."""
    sampling = {"temperature": options.temperature, "top_k": options.top_k or 0, "top_p": options.top_p}
    return {
        "do_sample": options.temperature > 0,
        "repetition_penalty": options.repetition_penalty,
        **(sampling if options.temperature > 0 else {}),
    }


def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, **options: Any
) -> Tensor:
    """Token ids (T,) of a prompt's continuation.

    Where the two would not fit the model, the prompt's beginning is cut off, down to half of what the model takes;
    then the continuation is shortened.
    """
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    limit = model.config.max_position_embeddings
    ids = ids[-max(limit - max_new_tokens, limit // 2) :]
    output = generate(
        model,
        torch.tensor([ids], device=model.device),
        max_new_tokens=min(max_new_tokens, limit - len(ids)),
        pad_token_id=tokenizer.eos_token_id,
        **options,
    )
    return output[0, len(ids) :]
