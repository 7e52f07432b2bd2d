"""The lean loss equals the plain one, and shifts its labels once."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stock_models import MODERN, VOCAB_SIZE, random_tokens, relative_error, small_config
from torch import nn

from modeling_gpt2x import GPT2XForCausalLM
from modeling_gpt2x.linear_gpt2x import chunked_linear_cross_entropy


def naive(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    """Full logits, float32, nothing clever."""
    logits = F.linear(hidden, weight).float()
    if (cap := options.get("softcap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / options.get("num_items_in_batch", (labels != -100).sum())


def problem(scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(3, 11, 16, requires_grad=True)
    weight = (scale * torch.randn(VOCAB_SIZE, 16)).requires_grad_()
    return hidden, weight, random_tokens(3, 11)


def assert_same(
    actual: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor], tolerance: float = 1e-6
) -> None:
    assert actual.item() == pytest.approx(expected.item(), rel=tolerance)
    for a, b in zip(torch.autograd.grad(3 * actual, inputs), torch.autograd.grad(3 * expected, inputs)):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < tolerance


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}]
)
@pytest.mark.parametrize("chunk_size", [None, 4, 33])
@pytest.mark.parametrize("num_ignored", [0, 1, 20])
def test_loss_and_gradients_equal_the_full_logits(options: dict, chunk_size: int | None, num_ignored: int) -> None:
    hidden, weight, labels = problem()
    labels.flatten()[:num_ignored] = -100
    actual = chunked_linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size, **options)
    assert_same(actual, naive(hidden, weight, labels, **options), [hidden, weight])


def test_very_unlikely_tokens_have_a_finite_loss() -> None:
    hidden, weight, labels = problem(scale=100.0)
    actual = chunked_linear_cross_entropy(hidden, weight, labels)
    assert actual > 100
    assert_same(actual, naive(hidden, weight, labels), [hidden, weight])


def test_frozen_heads_and_frozen_inputs_get_no_gradient() -> None:
    hidden, weight, labels = problem()
    expected = torch.autograd.grad(naive(hidden, weight, labels), hidden)[0]
    loss = chunked_linear_cross_entropy(hidden, weight.detach(), labels)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected)
    with torch.no_grad():
        assert not chunked_linear_cross_entropy(hidden, weight, labels).requires_grad


def test_all_labels_ignored_is_zero_and_not_nan() -> None:
    hidden, weight, labels = problem()
    loss = chunked_linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    assert loss.item() == 0.0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in torch.autograd.grad(loss, [hidden, weight]))


def test_padding_rows_of_the_vocabulary_get_neither_probability_nor_gradient() -> None:
    hidden, weight, labels = problem()
    padded = F.pad(weight.detach(), (0, 0, 0, 3), value=1.0).requires_grad_()
    loss = chunked_linear_cross_entropy(hidden, padded, labels, vocab_size=VOCAB_SIZE)
    expected = naive(hidden, weight, labels)
    torch.testing.assert_close(loss, expected)
    gradient = torch.autograd.grad(loss, padded)[0]
    assert torch.count_nonzero(gradient[VOCAB_SIZE:]) == 0
    torch.testing.assert_close(gradient[:VOCAB_SIZE], torch.autograd.grad(expected, weight)[0])


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    hidden, weight, labels = problem()
    with torch.autocast("cpu", torch.bfloat16):
        actual = chunked_linear_cross_entropy(hidden, weight, labels, chunk_size=8)
        expected = naive(hidden, weight, labels)
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(actual, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight])):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 1e-2


def gradients_in_float16(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float) -> Any:
    """As clipping sees them: of a loss that was scaled up, and then scaled down in a larger type."""
    inputs = [tensor.detach().half().requires_grad_() for tensor in (hidden, weight)]
    loss = chunked_linear_cross_entropy(*inputs, labels, num_items_in_batch=len(labels), chunk_size=512)
    return [gradient.double() / scale for gradient in torch.autograd.grad(loss * scale, inputs)]


def gradients_in_float64(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Any:
    inputs = [tensor.detach().half().double().requires_grad_() for tensor in (hidden, weight)]
    return torch.autograd.grad(F.cross_entropy(inputs[0] @ inputs[1].T, labels), inputs)


def test_gradients_that_float16_cannot_hold_survive_where_the_loss_is_scaled() -> None:
    """Of tokens whose probability is 4e-9; the smallest float16 is 6e-8, and a scale that comes later is too late."""
    hidden, weight, labels = torch.zeros(64, 16), torch.zeros(16, 16), torch.zeros(64, dtype=torch.long)
    hidden[:, 0] = weight[0, 0] = 4.375
    expected = gradients_in_float64(hidden, weight, labels)[1][1:, 0]
    assert expected.max() < 6e-8 < expected.max() * 2.0**16
    found = gradients_in_float16(hidden, weight, labels, 2.0**16)[1][1:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def rows_of_one_token() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of its row of the weight is a sum of 100,000 before it is divided by their number."""
    return torch.full((512, 4), 200.0), torch.zeros(32, 4), torch.zeros(512, dtype=torch.long)


def test_sums_of_gradients_that_float16_cannot_hold_are_finite_once_they_are_divided() -> None:
    expected = gradients_in_float64(*rows_of_one_token())
    assert expected[1].abs().max() * 512 > torch.finfo(torch.float16).max
    for found, exact in zip(gradients_in_float16(*rows_of_one_token(), 1.0), expected):
        torch.testing.assert_close(found, exact, rtol=2e-3, atol=1e-6)


def test_whether_a_gradient_overflows_is_up_to_the_scale_of_the_loss() -> None:
    found = [gradients_in_float16(*rows_of_one_token(), scale)[1] for scale in (2.0**16, 2.0**4)]
    assert [bool(gradient.isfinite().all()) for gradient in found] == [False, True]


def test_a_second_pass_over_the_graph_gives_the_same_gradient() -> None:
    hidden, weight, labels = problem()
    loss = chunked_linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, weight)[0])


def test_no_tensor_of_all_logits_is_made() -> None:
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    hidden, weight = torch.randn(2048, 4, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    with Watch():
        chunked_linear_cross_entropy(hidden, weight, torch.zeros(2048, dtype=torch.long))
    assert max(sizes) == 2048 * 500 / 4  # one chunk, and nothing larger


# ------------------------------------------------------------------------------------------------ in the model
def model_and_tokens(**options: Any) -> tuple[GPT2XForCausalLM, torch.Tensor]:
    return GPT2XForCausalLM(small_config(**options)), random_tokens(2, 13)


LEAN_CONFIGS = [{}, MODERN, {**MODERN, "final_logit_softcapping": 3.0}]


@pytest.mark.parametrize("options", LEAN_CONFIGS, ids=["gpt2", "modern", "softcap"])
def test_the_lean_loss_of_a_model_equals_its_plain_loss(options: dict) -> None:
    model, tokens = model_and_tokens(**options)
    labels = tokens.clone()
    labels[0, 3:6] = -100
    lean = model(tokens, labels=labels, return_logits=False)
    assert lean.logits is None
    plain = model(tokens, labels=labels)
    assert plain.loss.item() == pytest.approx(lean.loss.item(), rel=1e-6)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(lean.loss, parameters), torch.autograd.grad(plain.loss, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("return_logits", [True, False])
def test_labels_are_shifted_once(return_logits: bool) -> None:
    model, tokens = model_and_tokens()
    log_p = model(tokens).logits.log_softmax(-1)
    expected = -sum(log_p[b, t, tokens[b, t + 1]] for b in range(2) for t in range(12)) / 24
    loss = model(tokens, labels=tokens, return_logits=return_logits).loss
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("keyword", [{"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(5)}])
def test_num_items_in_batch_divides_the_summed_loss(keyword: dict, return_logits: bool) -> None:
    model, tokens = model_and_tokens()
    mean = model(tokens, labels=tokens).loss
    loss = model(tokens, labels=tokens, return_logits=return_logits, **keyword).loss
    torch.testing.assert_close(loss, mean * 24 / 5)


@pytest.mark.parametrize("return_logits", [True, False])
def test_shift_labels_are_taken_as_they_are(return_logits: bool) -> None:
    model, tokens = model_and_tokens()
    shifted = random_tokens(2, 13)
    expected = F.cross_entropy(model(tokens).logits.flatten(0, 1), shifted.flatten())
    loss = model(tokens, shift_labels=shifted, return_logits=return_logits).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        model(tokens, labels=tokens, shift_labels=shifted, return_logits=return_logits).loss, expected
    )


class LoRALinear(nn.Linear):
    """Stands for every head that adds something to x @ weight.T."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1e-1 * x.sum(-1, keepdim=True) * torch.arange(self.out_features)


@pytest.mark.parametrize("kind", ["lora", "bias", "hook"])
def test_other_heads_are_called_and_not_bypassed(kind: str) -> None:
    model, tokens = model_and_tokens(tie_word_embeddings=False)
    if kind == "lora":
        model.lm_head = LoRALinear(32, VOCAB_SIZE, bias=False)
    elif kind == "bias":
        model.lm_head = nn.Linear(32, VOCAB_SIZE, bias=True)
    else:
        model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    lean = model(tokens, labels=tokens, return_logits=False, num_items_in_batch=9)
    assert lean.logits is None
    torch.testing.assert_close(lean.loss, model(tokens, labels=tokens, num_items_in_batch=9).loss)


def test_no_labels_and_no_logits_are_refused() -> None:
    model, tokens = model_and_tokens()
    with pytest.raises(ValueError, match="return_logits=False leaves nothing to return without labels; give labels"):
        model(tokens, return_logits=False)


@pytest.mark.parametrize("options", LEAN_CONFIGS[1:], ids=["modern", "softcap"])
def test_the_lean_loss_compiles_into_one_graph(options: dict) -> None:
    model, tokens = model_and_tokens(**options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(tokens, labels=tokens).loss
    actual = compiled(tokens, labels=tokens, return_logits=False).loss
    parameters = list(model.parameters())
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
