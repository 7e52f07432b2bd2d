"""Twenty items of our own with HellaSwag's columns, and lm-eval's and llm.c's formulas written out."""

import re

import numpy as np
import torch

ACTIVITIES = ["Baking bread", "Fixing a bike", "How to sail", "Rock climbing", "Playing the flute"]
BEGINNINGS = ["A man kneads dough.", "The Wheel is off. ", "[header] Leave [title] Hoist the sail.", "Her hand slips"]
STARTS = ["he", "the Mechanic in Blue", "", "then She"]
ENDINGS = [
    "falls [step] down.",
    ", slowly, lets  go of it.",
    "eats the rope",
    "sings! [substeps] Softly [end]",
    "är da.",
]


def rows():
    """Every text varies on its own period, so that no two items are alike."""
    made = []
    for i in range(20):
        start = STARTS[i % 4]
        beginning = BEGINNINGS[i % 3] + (" [edit]" if i % 7 == 0 else "")
        made.append(
            {
                "activity_label": ACTIVITIES[i % 5],
                "ctx_a": beginning,
                "ctx_b": start,
                "ctx": f"{beginning} {start}".strip(),
                "endings": [ENDINGS[(i + j) % 5] + "?" * (i * j % 3) for j in range(4)],
                "label": i % 4 if i % 2 else str(i % 4),
            }
        )
    return made


def preprocess(text):
    """lm-eval 0.4.13, tasks/hellaswag/utils.py, in its own order of steps."""
    text = text.strip()
    text = text.replace(" [title]", ". ")
    text = re.sub("\\[.*?\\]", "", text)
    return text.replace("  ", " ")


def log_prob(model, context, continuation, limit):
    """One row with all its logits, as lm-eval's HFLM computes it."""
    ids = (context + continuation)[-(limit + 1) :][:-1]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits.double()
    log_probs = torch.log_softmax(logits[0, -len(continuation) :], -1)
    return log_probs[range(len(continuation)), continuation].sum().item()


def lm_eval_log_probs(model, tokenizer, row, limit=10_000):
    """(log-probabilities of the four endings, their lengths in characters)."""
    context = preprocess(row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize())
    endings = [preprocess(ending) for ending in row["endings"]]
    found = []
    for ending in endings:
        continuation, stripped = " " + ending, context.rstrip()
        spaces = context[len(stripped) :]
        whole = tokenizer.encode(stripped + spaces + continuation)
        own = tokenizer.encode(stripped)
        found.append(log_prob(model, own, whole[len(own) :], limit))
    return found, [len(ending) for ending in endings]


def completion_log_probs(model, tokenizer, row):
    """The same of llm.c's dev/data/hellaswag.py: text as it stands, tokens counted."""
    context = tokenizer.encode(row["ctx"])
    endings = [tokenizer.encode(" " + ending) for ending in row["endings"]]
    return [log_prob(model, context, ids, 10_000) for ids in endings], [len(ids) for ids in endings]


def shares(all_log_probs, all_lengths, labels):
    """(acc, acc_norm) by a plain loop."""
    hits = hits_norm = 0
    for log_probs, lengths, label in zip(all_log_probs, all_lengths, labels, strict=True):
        hits += int(np.argmax(log_probs) == label)
        hits_norm += int(np.argmax(np.array(log_probs) / np.array(lengths)) == label)
    return hits / len(labels), hits_norm / len(labels)
