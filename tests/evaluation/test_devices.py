"""What evaluation asks of a device: no float64, nothing fetched before the end, no attention by cuDNN while keys grow.

The meta device stands for one that is not here: it computes shapes and dtypes, and whatever is fetched from it raises.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2x.chat import Conversation
from gpt2x.config import ChatSection, GenerationRecipe
from gpt2x.distributed.ranks import sum_over_ranks
from gpt2x.evaluation.continuations import Question, score_continuations
from gpt2x.evaluation.samples import sample_texts, stream_text
from gpt2x.evaluation.validation import validate
from gpt2x.tokenizers.chat_template import chat_tokenizer

TEMPLATE = Path(__file__).parents[2] / "tokenization" / "plain.jinja"
META = torch.device("meta")
BATCH = {"input_ids": torch.arange(24).reshape(2, 12), "labels": torch.arange(24).reshape(2, 12)}
QUESTION = Question(context=[1, 2, 3], continuations=[[4, 5], [6, 7, 8]])


class DtypesThere(TorchDispatchMode):
    """Collects the dtypes of what is computed on the meta device."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.found |= {leaf.dtype for leaf in leaves if leaf.device == META}
        return result


@pytest.fixture
def meta(model, monkeypatch):
    """The model there; torch refuses to say whether autocast is on for this device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    return model.to(META)


def stops_after(number):
    answers = iter([False] * number + [True])
    return lambda: next(answers)


def test_validation_fetches_nothing_from_the_device_before_its_end_and_has_no_float64_there(meta):
    accelerator = SimpleNamespace(device=META)
    with DtypesThere() as dtypes:
        found = validate(meta, [BATCH] * 4, num_bytes={"one": 1}, accelerator=accelerator, is_stopped=stops_after(3))
    assert found is None
    assert torch.float32 in dtypes.found
    assert torch.float64 not in dtypes.found


def test_continuations_fetch_nothing_from_the_device_before_their_end_and_have_no_float64_there(meta):
    with DtypesThere() as dtypes:
        found = score_continuations(meta, [QUESTION] * 4, batch_size=1, is_stopped=stops_after(3))
    assert found is None
    assert torch.float32 in dtypes.found
    assert torch.float64 not in dtypes.found


def test_sums_of_ranks_are_added_up_on_the_cpu_and_no_bit_is_lost_on_the_way():
    """Two ranks whose sums float32 cannot tell apart, where gather is what accelerate's does."""
    sums = torch.tensor([[1 / 3, 2.0**40 + 1], [5.0, 1e-300]], dtype=torch.float64)
    dtypes = []

    def gather(own):
        dtypes.append(own.dtype)
        return torch.cat([own, sums.mul(3).view(torch.int64)])

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=gather, num_processes=2, process_index=0, parallelism_config=None
    )
    assert torch.equal(sum_over_ranks(sums, accelerator), sums + sums.mul(3))
    assert dtypes == [torch.int64]


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.fixture
def models(model):
    stock = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
    return {"gpt2x": model, "stock": stock}


def converse(model, tokenizer):
    options = GenerationRecipe(chat=True, max_new_tokens=4)
    Conversation(model, chat_tokenizer(tokenizer, ChatSection(template=TEMPLATE)), options).answer("hello")


USES = {
    "samples": lambda model, tokenizer: sample_texts(model, tokenizer, ["a"], max_new_tokens=4, seed=0),
    "generate.py": lambda model, tokenizer: stream_text(model, tokenizer, "a", GenerationRecipe(max_new_tokens=4)),
    "chat": converse,
    "HellaSwag": lambda model, _: score_continuations(model, [QUESTION], batch_size=1),
}


@pytest.mark.parametrize("form", ["gpt2x", "stock"])
@pytest.mark.parametrize("use", USES)
def test_where_the_number_of_keys_changes_attention_is_never_by_cudnn_and_afterwards_it_may_be(
    models, tokenizer, use, form
):
    model, states = models[form].eval(), []
    model.register_forward_pre_hook(lambda *_: states.append(torch.backends.cuda.cudnn_sdp_enabled()))
    USES[use](model, tokenizer)
    assert set(states) == {False}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_validation_whose_lengths_are_the_trainings_keeps_cudnn(model, accelerator):
    states = []
    model.register_forward_pre_hook(lambda *_: states.append(torch.backends.cuda.cudnn_sdp_enabled()))
    validate(model, [BATCH], num_bytes={"one": 1}, accelerator=accelerator)
    assert states == [True]


# --- memory ----------------------------------------------------------------------------------------------------------

PASSES = """
import resource, torch
from gpt2x.distributed.devices import keep_freed_memory
keep_freed_memory()
def work():
    parts = [torch.ones(3 * 2**20) for _ in range(3)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.trial
@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux gives memory back at once")
def test_memory_that_is_kept_is_not_asked_for_again():
    command = [sys.executable, "-c", PASSES]
    page_faults = int(subprocess.run(command, capture_output=True, check=True).stdout)
    # of twenty passes; without keep_freed_memory most ask for all that they need
    assert page_faults < 3 * (3 * 3 * 2**20 * 4 / 4096)
