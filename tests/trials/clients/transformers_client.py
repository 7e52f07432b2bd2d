"""Continues texts and chats by transformers, greedily: a request on stdin, what it read and wrote on stdout."""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(directory: str, *, texts: list[str], chats: list[list[dict]], length: int) -> list[dict[str, Any]]:
    """The ids of every prompt and of its continuation; whatever the tokenizer returns goes to the model."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    rendered = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    answers = []
    for text in (*texts, *rendered):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=length, do_sample=False)[0].tolist()
        num_ids = inputs["input_ids"].shape[1]
        answers.append({"ids": output[:num_ids], "continuation": output[num_ids:]})
    return answers


request = json.load(sys.stdin)
directories = request.pop("directories")
print(json.dumps([answer(directory, **request) for directory in directories]))
