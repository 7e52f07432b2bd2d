"""Which parameter is updated how, against torch and against a Muon of one matrix at a time."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2x.config import OptimizerSection
from gpt2x.training.optimizers import Muon, make_optimizers, orthogonalize, set_learning_rates, split_parameters
from modeling_gpt2x import GPT2XConfig, GPT2XForCausalLM

SHAPE = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(24).reshape(2, 12)


def make_model(**changes):
    torch.manual_seed(0)
    return GPT2XForCausalLM(GPT2XConfig(**SHAPE, **changes))


def names_in(optimizers, model):
    """Per parameter its name, optimizer and weight decay; a parameter in two groups is listed twice."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (names[id(parameter)], type(optimizer).__name__, group["weight_decay"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_every_trainable_parameter_is_in_exactly_one_group(optimizer, is_tied):
    model = make_model(tie_word_embeddings=is_tied)
    model.model.norm.weight.requires_grad_(False)
    listed = [name for name, _, _ in names_in(make_optimizers(model, OptimizerSection(name=optimizer)), model)]
    assert sorted(listed) == sorted(set(dict(model.named_parameters())) - {"model.norm.weight"})


def test_adamw_decays_the_matrices_and_nothing_else():
    model = make_model()
    listed = names_in(make_optimizers(model, OptimizerSection(name="adamw", weight_decay=0.3)), model)
    decays = {name: decay for name, _, decay in listed}
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    assert decays == {name: 0.3 if shapes[name] == 2 else 0.0 for name in shapes}


def test_a_tied_head_is_one_parameter_of_the_embeddings():
    model = make_model(tie_word_embeddings=True)
    matrices, embeddings, vectors = split_parameters(model)
    assert [id(model.model.embed_tokens.weight)] == [id(p) for p in embeddings if p.shape[0] == 48]
    assert len(matrices) + len(embeddings) + len(vectors) == len(list(model.parameters()))


@pytest.mark.parametrize("is_tied", [True, False])
def test_muon_takes_the_matrices_of_the_layers_and_nothing_else(is_tied):
    model = make_model(tie_word_embeddings=is_tied)
    listed = names_in(make_optimizers(model, OptimizerSection(name="muon", weight_decay=0.3)), model)
    expected = {name for name, p in model.named_parameters() if name.startswith("model.layers.") and p.ndim == 2}
    assert {name for name, optimizer, _ in listed if optimizer == "Muon"} == expected
    assert {decay for name, optimizer, decay in listed if optimizer == "AdamW"} == {0.0}
    assert {decay for name, optimizer, decay in listed if optimizer == "Muon"} == {0.3}


def test_the_groups_are_right_for_a_model_of_transformers_too():
    config = GPT2Config(vocab_size=48, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    matrices, embeddings, vectors = split_parameters(GPT2LMHeadModel(config))
    assert (len(matrices), len(embeddings), len(vectors)) == (4, 2, 4 + 4 + 2)


def loss_of(model):
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def test_adamw_equals_torchs_on_groups_made_by_hand():
    section = OptimizerSection(learning_rate=3e-3, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6)
    ours = make_model()
    theirs = copy.deepcopy(ours)
    (own,) = make_optimizers(ours, section)
    decayed = [parameter for parameter in theirs.parameters() if parameter.ndim == 2]
    rest = [parameter for parameter in theirs.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=3e-3, betas=(0.8, 0.9), eps=1e-6, foreach=False)
    for model, optimizer in ((ours, own), (theirs, reference)):
        for _ in range(3):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)


def assert_moved_alike(start, found, expected):
    """The two went the same way, up to what the rounding to bfloat16 inside an update does."""
    assert (found - expected).norm() < 0.04 * (expected - start).norm()


def naive_muon(weight, gradients, *, lr, momentum, weight_decay):
    """Jordan's Muon for one matrix, in the words of his page: buffer, Nesterov, five quintic iterations, scale."""
    buffer = torch.zeros_like(weight)
    for gradient in gradients:
        buffer = momentum * buffer + (1 - momentum) * gradient
        update = (1 - momentum) * gradient + momentum * buffer
        x = update.bfloat16()
        if x.shape[0] > x.shape[1]:
            x = x.T
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        if weight.shape[0] > weight.shape[1]:
            x = x.T
        weight = weight * (1 - lr * weight_decay)
        weight = weight - lr * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * x.float()
    return weight


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_muon_equals_a_naive_one_matrix_by_matrix(shape):
    torch.manual_seed(1)
    weights = [torch.randn(shape) for _ in range(3)]
    gradients = [[torch.randn(shape) * scale for scale in (1.0, 0.1, 3.0)] for _ in weights]
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = Muon(parameters, **settings)
    for step in range(3):
        for parameter, own in zip(parameters, gradients):
            parameter.grad = own[step].clone()
        optimizer.step()
    for parameter, weight, own in zip(parameters, weights, gradients):
        assert_moved_alike(weight, parameter.data, naive_muon(weight, own, **settings))


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_muon_equals_torchs(shape):
    torch.manual_seed(2)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = [Muon([ours], **settings), torch.optim.Muon([theirs], **settings, nesterov=True)]
    for scale in (1.0, 0.1, 3.0):
        ours.grad = torch.randn(shape) * scale
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert_moved_alike(start, ours.data, theirs.data)


@pytest.mark.parametrize("shape", [(32, 32), (64, 24), (24, 64)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(3)
    left, _, right = torch.linalg.svd(torch.randn(5, *shape), full_matrices=False)
    spectrum = torch.linspace(0.3, 20, 24 if 24 in shape else 32)
    singular_values = torch.linalg.svdvals(orthogonalize(left * spectrum @ right, steps=5))
    assert singular_values.min() > 0.6
    assert singular_values.max() < 1.25


def test_orthogonalization_keeps_the_directions():
    torch.manual_seed(4)
    matrix = torch.randn(24, 24)
    left, _, right = torch.linalg.svd(matrix)
    nearest = left @ right
    found = orthogonalize(matrix[None], steps=5)[0]
    assert F.cosine_similarity(found.flatten(), nearest.flatten(), dim=0) > 0.95


@pytest.mark.parametrize(
    ("mixed_precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.bfloat16)]
)
def test_the_products_of_muon_follow_the_precision_of_the_run(mixed_precision, dtype):
    section = OptimizerSection(name="muon")
    muon, _ = make_optimizers(make_model(), section, mixed_precision=mixed_precision)
    assert [group["ns_dtype"] for group in muon.param_groups] == [dtype]


def test_orthogonalizing_in_bfloat16_is_a_formula_that_must_not_change_by_a_bit():
    """Measured recipes were trained with it."""
    torch.manual_seed(5)
    tall = torch.randn(3, 40, 24)
    x = tall.bfloat16().mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    assert torch.equal(orthogonalize(tall), x.mT.float())


def losses_of_muon(num_parts):
    """Losses of 12 steps in float32 whose gradient is the mean of those of so many parts of the batch, as of ranks."""
    model = make_model()
    optimizers = make_optimizers(model, OptimizerSection(name="muon"), mixed_precision="no")
    generator, losses = torch.Generator().manual_seed(6), []
    for _ in range(12):
        ids = torch.randint(48, (8, 12), generator=generator)
        parts = [model(input_ids=part, labels=part, use_cache=False).loss for part in ids.chunk(num_parts)]
        gradients = [torch.autograd.grad(part, list(model.parameters())) for part in parts]
        for parameter, *own in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = sum(own) / num_parts
        for optimizer in optimizers:
            optimizer.step()
        losses.append(sum(part.item() for part in parts) / num_parts)
    return losses


@pytest.mark.parametrize("num_parts", [2, 4])
def test_in_float32_muon_does_not_show_how_a_gradient_was_summed(num_parts):
    assert losses_of_muon(num_parts) == pytest.approx(losses_of_muon(1), abs=1e-5)


def test_muon_leaves_a_matrix_without_a_gradient_alone():
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    Muon([parameter], lr=1.0, momentum=0.9, weight_decay=0.5).step()
    assert torch.equal(parameter.data, torch.ones(4, 4))


def test_each_group_is_set_to_the_same_share_of_its_own_peak():
    optimizers = make_optimizers(
        make_model(), OptimizerSection(name="muon", learning_rate=0.004, muon_learning_rate=0.02)
    )
    for factor in (1.0, 0.5, 0.25):  # not compounded
        set_learning_rates(optimizers, factor)
    assert {group["lr"] for group in optimizers[0].param_groups} == {0.02 * 0.25}
    assert {group["lr"] for group in optimizers[1].param_groups} == {0.004 * 0.25}
