"""Loss and gradient of one step on the shards of two processes, what they generate, and what all is without shards."""

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

NUM_RANKS = 2
# precision: rows of each rank, their length, the scale of the loss without which gradients vanish in float16
STEPS = {"no": (2, 1024, 1.0), "bf16": (2, 1024, 1.0), "fp16": (1100, 64, 2.0**16)}
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_model(length):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": length}
    return GPT2XForCausalLM(GPT2XConfig(vocab_size=64, bos_token_id=0, eos_token_id=0, **shape))


def rows(precision, rank):
    """(token ids, labels) of a rank; on one rank fewer are predicted than on the other."""
    num_rows, length, _ = STEPS[precision]
    ids = torch.randint(0, 64, (num_rows, length), generator=torch.Generator().manual_seed(rank))
    labels = ids.clone()
    labels[0, : 17 + 10 * rank] = -100
    return ids, labels


def without_shards(precision):
    """(the number of targets, loss, gradients by name): of the rows of both ranks in one process, by torch's own loss.

    The model is of the precision as a whole, as layers on shards are, and the rows of each rank are added in float32.
    """
    _, length, scale = STEPS[precision]
    model = make_model(length).to(DTYPES[precision])
    ranks = [rows(precision, rank) for rank in range(NUM_RANKS)]
    num_targets = sum(int((labels[:, 1:] != -100).sum()) for _, labels in ranks)
    loss, gradients = 0.0, {name: torch.zeros(weight.shape) for name, weight in model.named_parameters()}
    for ids, labels in ranks:
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        share = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") / num_targets
        model.zero_grad(set_to_none=True)
        (share * scale).backward()
        loss += share.item()
        for name, weight in model.named_parameters():
            gradients[name] += weight.grad.float() / scale
    return num_targets, loss, gradients


def generated(model, rank):
    """What the model writes on a rank, on one of them longer than on the other."""
    from gpt2x.evaluation.samples import generate

    length = 2 + 6 * rank
    ids = torch.tensor([[1, 2, 3 + rank]])
    options = {"min_new_tokens": length, "max_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    return generate(model.eval(), ids, **options)


def write_steps(directory):
    """On each of the ranks: the step of every precision, as the loop takes it, to DIRECTORY/step_PRECISION.

    And what was generated with the shards of float32, to DIRECTORY/generated_RANK.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    from gpt2x.distributed.devices import let_accelerate_shard_on_cpu, make_fsdp_plugin
    from gpt2x.distributed.sharding import gather
    from gpt2x.training.steps import accumulate_losses

    for precision, (_, length, scale) in STEPS.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        let_accelerate_shard_on_cpu()
        # accelerate's own fp16 is for GPUs; it is FSDP2 that computes in it
        autocast = "no" if precision == "fp16" else precision
        accelerator = Accelerator(cpu=True, mixed_precision=autocast, fsdp_plugin=make_fsdp_plugin(precision))
        model = make_model(length)
        model = accelerator.prepare(model, torch.optim.SGD(model.parameters()))[0]
        if precision == "fp16":
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        ids, labels = rows(precision, accelerator.process_index)
        losses = accumulate_losses(accelerator, model, [{"input_ids": ids, "labels": labels}])
        loss = accelerator.reduce(losses.shares.sum(), reduction="mean")
        gradients = {name: parameter.grad for name, parameter in accelerator.unwrap_model(model).named_parameters()}
        wholes = gather(gradients, is_writer=accelerator.is_main_process)
        if precision == "no":
            ids = generated(accelerator.unwrap_model(model), accelerator.process_index)
            save_file({"ids": ids}, directory / f"generated_{accelerator.process_index}.safetensors")
        if wholes:
            unscaled = {name: gradient / scale for name, gradient in wholes.items()}
            save_file({"loss": loss, **unscaled}, directory / f"step_{precision}.safetensors")
