"""Continues chats by mistral.rs, greedily; it says how many tokens it read, not which."""

import json
import sys

from mistralrs import ChatCompletionRequest, ModelDType, Runner, Which


def answer(directory: str, chat: list[dict], length: int) -> dict:
    """The number of tokens of the chat and the ids of its continuation."""
    runner = Runner(which=Which.Plain(model_id=directory, dtype=ModelDType.F32))
    options = {"max_tokens": length, "temperature": 0.0, "logprobs": True, "top_logprobs": 1}
    request = ChatCompletionRequest(model="default", messages=chat, **options)
    response = runner.send_chat_completion_request(request)
    chosen = [token.top_logprobs[0].token for token in response.choices[0].logprobs.content]
    return {"num_ids": response.usage.prompt_tokens, "continuation": chosen}


request = json.load(sys.stdin)
answers = [
    [answer(directory, chat, request["length"]) for chat in request["chats"]] for directory in request["directories"]
]
print(json.dumps(answers))
