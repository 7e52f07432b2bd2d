"""Continues texts and chats by onnxruntime-genai, greedily: a request on stdin, what it read and wrote on stdout."""

import json
import sys

import onnxruntime_genai as genai

request = json.load(sys.stdin)
model = genai.Model(request["directory"])
tokenizer = genai.Tokenizer(model)
chats = [tokenizer.apply_chat_template(json.dumps(chat), add_generation_prompt=True) for chat in request["chats"]]
answers = []
for text in (*request["texts"], *chats):
    ids = tokenizer.encode(text)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + request["length"], do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    sequence = [int(token) for token in generator.get_sequence(0)]
    answers.append({"ids": sequence[: len(ids)], "continuation": sequence[len(ids) :]})
print(json.dumps(answers))
