"""A model and the tokenizer of its data: whether they belong together, and room for new tokens."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gpt2x.errors import UserError
from gpt2x.locate import find_tokenizer, holds_tokenizer
from gpt2x.tokenizers.bpe import vocabulary_size
from gpt2x.tokenizers.loading import open_tokenizer


def check_tokenizer(directory: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses data whose ids mean something else to a model; one without a tokenizer is taken at its word.

    Args:
        directory: of the model, or its Hub id.
        tokenizer: the data's, which may have more tokens than the model's own.

    Raises:
        UserError: names a token that differs.
    """
    found = find_tokenizer(directory)
    if not holds_tokenizer(found):
        return
    own = open_tokenizer(found).get_vocab()
    ids = tokenizer.get_vocab()
    differ = [token for token, number in own.items() if ids.get(token) != number]
    if differ:
        differing = min(differ, key=own.__getitem__)
        raise UserError(
            f"the data's tokenizer is not that of {directory}, which has {differing!r} as {own[differing]}, not as "
            f"{ids.get(differing)}; prepare the data again with tokenizer.path {directory}."
        )


def adopt_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a model a row for every token, each new row the mean of the others, and the tokenizer's special tokens.

    Its texts then end at the tokenizer's end of text, and still where they ended before.
    """
    rows, needed = model.config.vocab_size, vocabulary_size(tokenizer)
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
        with torch.no_grad():
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                module.weight[rows:] = module.weight[:rows].mean(0)  # the same twice where they are tied
    before = model.generation_config.eos_token_id
    others = before if isinstance(before, list) else [before]
    ends = [tokenizer.eos_token_id, *(end for end in others if end not in (None, tokenizer.eos_token_id))]
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
