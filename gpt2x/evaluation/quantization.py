"""int8 linear layers for inference: weights rounded once per output, activations rounded anew per token.

Written on torch._int_mm, the integer product that torchao's dynamic quantization calls as well. torch's own
quantize_dynamic is deprecated, has one scale for all tokens of a batch, and torchao wants a package of its own.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gpt2x.errors import UserError

_LARGEST = 127


class Int8Linear(nn.Module):
    """x W^T + b with W and x rounded to int8, symmetric around zero (LLM.int8(), arXiv:2208.07339, section 2.1).

    Shapes: N outputs, K inputs.
    """

    weight: Tensor
    steps: Tensor

    def __init__(self, weight_NK: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        values_NK, steps_N1 = _to_int8(weight_NK.detach().float())
        self.register_buffer("weight", values_NK)
        self.register_buffer("steps", steps_N1[:, 0])
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) of any float type to (..., N) of the same."""
        values_MK, steps_M1 = _to_int8(x.reshape(-1, x.shape[-1]).float())
        y_MN = torch._int_mm(values_MK, self.weight.t()).float()
        y_MN.mul_(steps_M1).mul_(self.steps)
        if self.bias is not None:
            y_MN.add_(self.bias)
        return y_MN.to(x.dtype).reshape(*x.shape[:-1], -1)


def _to_int8(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's values in steps of its largest / 127, and the steps (M, 1)."""
    steps_M1 = x_MK.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
    return (x_MK / steps_M1).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), steps_M1


def quantize_int8(model: PreTrainedModel) -> PreTrainedModel:
    """Replaces every linear layer of a model on the CPU, its head included, for inference; changes the model.

    Embedding tables keep their type, also the one that the head was tied to. Nothing of this can be trained or saved.

    Raises:
        UserError: where the model is not on the CPU.
    """
    if model.device.type != "cpu":
        raise UserError(f"int8 inference runs on the CPU and the model is on {model.device}; move it there.")
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, Int8Linear(module.weight.t(), module.bias))
        elif isinstance(module, nn.Linear):
            model.set_submodule(name, Int8Linear(module.weight, module.bias))
    return model.eval()


def num_bytes(model: nn.Module) -> int:
    """What a model's parameters and buffers take; what is shared counts once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
