"""A conversation with a model."""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList, TextStreamer

from gpt2x.config import GenerationRecipe
from gpt2x.corpus.chat_layouts import Message
from gpt2x.errors import UserError
from gpt2x.evaluation.samples import generate, sampling_arguments
from gpt2x.prerequisites import no_chat_template
from gpt2x.tokenizers.chat_template import ChatEncoder
from modeling_gpt2x.context_gpt2x import CACHE_NAME


def chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Iterable[str], *, options: GenerationRecipe
) -> None:
    """Prints the answer to each of a user's turns while it is being written.

    Ctrl-C ends an answer after its next token, and the conversation where it comes again before that. A turn that
    cannot be read is complained about on stderr and forgotten.

    Args:
        model: any causal language model.
        tokenizer: the model's, with a chat template.
        prompts: the user's turns; blank ones are passed over.
        options: with the system turn, and how to choose tokens.

    Raises:
        UserError: where the tokenizer has no chat template, and where the only turn, ``options.prompt``, is no turn.
    """
    conversation = Conversation(model, tokenizer, options)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for prompt in prompts:
        if not prompt.strip():
            continue
        try:
            with _interrupt_sets_a_flag() as is_interrupted:
                conversation.answer(prompt, streamer=streamer, is_interrupted=is_interrupted)
        except KeyboardInterrupt:
            print()
            return
        except UserError as error:
            if options.prompt is not None:
                raise
            print(f"error: {error}", file=sys.stderr)


class Conversation:
    """The turns so far, and the model's cache of them.

    Where the next turns only add to what the model has seen, only the new tokens go through it; its own answers stay
    the very ids that it chose. A template that writes earlier turns differently later on costs the cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        options: GenerationRecipe,
        *,
        notify: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ) -> None:
        """Raises UserError where the tokenizer has no chat template."""
        if tokenizer.chat_template is None:
            raise no_chat_template(options.model)
        self._model, self._tokenizer, self._options, self._notify = model, tokenizer, options, notify
        self._encoder = ChatEncoder(tokenizer, learn="all")
        self._stops = _stop_tokens(model, tokenizer)
        self._limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.messages: list[Message] = []
        if options.system is not None:
            self.messages.append({"role": "system", "content": options.system})
        # What the model has seen: its ids, their cache (of all but the last), and the template's part of them.
        self.ids: list[int] = []
        self._cache: Any = None
        self._skeleton: list[int] = []

    def answer(
        self,
        text: str,
        *,
        streamer: TextStreamer | None = None,
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> str:
        """Adds a turn of the user and the model's answer to it to the conversation.

        Args:
            text: what the user says.
            streamer: gets the answer while it is being written.
            is_interrupted: asked after every token, whether the answer ends here.

        Raises:
            UserError: where the turn does not fit the model, or its template refuses it; nothing is added then.
        """
        messages = self._shortened([*self.messages, {"role": "user", "content": text}])
        ids, cache = self._next_ids(messages)
        self._cache = None  # until it is whole again
        output = self._generate(ids, cache, streamer, is_interrupted)
        self.ids, self._cache = output.sequences[0].tolist(), output[CACHE_NAME]
        self._skeleton = self._encoder.prompt(_without_answers(messages))
        answer = self._tokenizer.decode(
            self.ids[len(ids) :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _next_ids(self, messages: list[Message]) -> tuple[list[int], Any]:
        """The ids to continue, and the cache of their beginning, if there is one.

        What the template writes between two answers follows from the conversation without the answers' texts, if it
        writes these as they are.
        """
        skeleton, known = self._encoder.prompt(_without_answers(messages)), len(self._skeleton)
        continues = messages[: len(self.messages)] == self.messages and skeleton[:known] == self._skeleton
        if self._cache is None or not continues or not self._keeps_answers(messages):
            return self._encoder.prompt(messages), None
        added = skeleton[known:]
        ends_twice = self.ids[-1] in self._stops and added[0] in self._stops
        return (self.ids[:-1] if ends_twice else self.ids) + added, self._cache

    def _keeps_answers(self, messages: list[Message]) -> bool:
        """Whether the template writes every answer whole; some leave out what a model thought before it answered."""
        text = self._tokenizer.decode(self._encoder.prompt(messages), clean_up_tokenization_spaces=False)
        place = 0
        for message in messages:
            if message["role"] == "assistant":
                found = text.find(message["content"], place)
                if found < 0:
                    return False
                place = found + len(message["content"])
        return True

    def _shortened(self, messages: list[Message]) -> list[Message]:
        """The conversation without its oldest turns, as far as they would leave no room for an answer."""
        kept = messages
        while self._limit is not None and len(self._next_ids(kept)[0]) > self._limit - self._room():
            system, turns = kept[: len(kept) - len(_turns(kept))], _turns(kept)
            later_users = [place for place, turn in enumerate(turns) if turn["role"] == "user" and place > 0]
            if not later_users:
                raise self._too_long(system)
            kept = system + turns[later_users[0] :]
        if len(kept) < len(messages):
            self._notify(f"(the conversation outgrew {self._limit} tokens; its oldest turns are forgotten)")
        return kept

    def _too_long(self, system: list[Message]) -> UserError:
        """The complaint of a turn, or of the system turn where that does not fit even beside a turn of nothing."""
        assert self._limit is not None
        alone = self._encoder.prompt([*system, {"role": "user", "content": ""}])
        which = "system" if system and len(alone) > self._limit - self._room() else "the turn"
        positions = self._limit - self._room()
        return UserError(f"{which} takes more than the {positions} positions that the model has for it; shorten it.")

    def _room(self) -> int:
        """What is kept free for an answer, in tokens."""
        assert self._limit is not None
        return min(self._options.max_new_tokens, self._limit // 2)

    def _generate(
        self, ids: list[int], cache: Any, streamer: TextStreamer | None, is_interrupted: Callable[[], bool]
    ) -> Any:
        input_ids = torch.tensor([ids], device=self._model.device)
        room = self._limit - len(ids) if self._limit is not None else self._options.max_new_tokens
        pad = self._tokenizer.pad_token_id
        return generate(
            self._model,
            input_ids,
            max_new_tokens=min(self._options.max_new_tokens, room),
            **sampling_arguments(self._options),
            eos_token_id=self._stops,
            pad_token_id=pad if pad is not None else self._stops[0],
            stopping_criteria=StoppingCriteriaList([_Interruption(is_interrupted)]),
            streamer=streamer,
            return_dict_in_generate=True,
            **{CACHE_NAME: cache},
        )


class _Interruption(StoppingCriteria):
    """Ends a generation between two tokens, so that its cache stays whole."""

    def __init__(self, is_interrupted: Callable[[], bool]) -> None:
        self._is_interrupted = is_interrupted

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self._is_interrupted(), device=input_ids.device)


@contextmanager
def _interrupt_sets_a_flag() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C is noted and the second raises KeyboardInterrupt as ever."""
    flag = threading.Event()
    previous = signal.getsignal(signal.SIGINT)

    def note(signal_number: int, frame: object) -> None:
        flag.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, note)
    try:
        yield flag.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids at which an answer ends: the tokenizer's, and those of the model's generation_config."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(stop for stop in (tokenizer.eos_token_id, *listed) if stop is not None))


def _turns(messages: list[Message]) -> list[Message]:
    """The conversation without the system turn it begins with."""
    return messages[1:] if messages[0]["role"] == "system" else messages


def _without_answers(messages: list[Message]) -> list[Message]:
    return [message | {"content": ""} if message["role"] == "assistant" else message for message in messages]
