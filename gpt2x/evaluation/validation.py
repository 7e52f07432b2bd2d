"""Loss, bits per byte, perplexity and token accuracy on the whole held-out set."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2x.distributed.devices import on_device
from gpt2x.distributed.ranks import sum_over_ranks


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a model makes of the held-out documents.

    Attributes:
        loss: nats per token.
        bits_per_byte: summed nats over the documents, end-of-text included, / ln 2 / their UTF-8 bytes; comparable
            across tokenizers, except with data.packing whole_documents: the first token of a plain text is then not
            predicted, while its bytes count. Of conversations, over what is learned.
        perplexity: exp(loss).
        token_accuracy: share of tokens that the model ranks first.
        num_tokens: how many tokens were predicted.
        sources: the same of each source by its name, where there are several.
    """

    loss: float
    bits_per_byte: float
    perplexity: float
    token_accuracy: float
    num_tokens: int
    sources: Mapping[str, "Validation"] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """The record of metrics.jsonl."""
        metrics = {
            "val/loss": self.loss,
            "val/bits_per_byte": self.bits_per_byte,
            "val/perplexity": self.perplexity,
            "val/token_accuracy": self.token_accuracy,
        }
        for name, source in self.sources.items():
            metrics[f"val/{name}/loss"] = source.loss
            metrics[f"val/{name}/bits_per_byte"] = source.bits_per_byte
            metrics[f"val/{name}/token_accuracy"] = source.token_accuracy
        return metrics


def validate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    num_bytes: Mapping[str, int],
    accelerator: Accelerator,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Validation | None:
    """Predicts every token of the batches once; the result depends on neither batch size, padding nor ranks.

    Args:
        model: the prepared model, or a plain one.
        batches: this rank's share: ``input_ids`` (B, T) and unshifted ``labels`` (B, T), -100 where nothing counts;
            where there are several sources, ``sources`` (B,), the number of each row's.
        num_bytes: UTF-8 bytes of each source's documents by its name, of all ranks.
        accelerator: for the device and the sum over ranks.
        is_stopped: asked before each batch; must answer alike on all ranks.

    Returns:
        The result, the same on all ranks; None where is_stopped ended it.
    """
    was_training = model.training
    model.eval()
    found = []
    # eager: another mode and batch size would compile everything once more
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for batch in batches:
            if is_stopped():
                break
            sources_B = batch.get("sources", torch.zeros(len(batch["labels"]), dtype=torch.long))
            counted_B1 = (batch["labels"][:, 1:] != -100).sum(1, keepdim=True)
            found.append((_batch_sums(model, batch, accelerator.device), counted_B1, sources_B))
        else:
            sums = torch.zeros(len(num_bytes), 3, dtype=torch.float64)  # nats, hits, tokens of each source
            for sums_B2, counted_B1, sources_B in found:  # fetched only now: no pass waits for the one before it
                sums_B3 = torch.cat([sums_B2.cpu().double(), counted_B1], dim=1)
                sums += torch.zeros_like(sums).index_add_(0, sources_B, sums_B3)
            model.train(was_training)
            return _of_all_sources(sum_over_ranks(sums, accelerator), num_bytes)
    model.train(was_training)
    return None


def _batch_sums(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """(B, 2) float32 on the device: the nats and the hits of each row."""
    inputs = on_device({name: tensor for name, tensor in batch.items() if name != "sources"}, device)
    targets_BT = inputs.pop("labels")[:, 1:]
    logits_BTV = model(**inputs, use_cache=False).logits
    sums = []
    for logits_TV, targets_T in zip(logits_BTV[:, :-1], targets_BT, strict=True):  # one row's float32 at a time
        nats = F.cross_entropy(logits_TV.float(), targets_T, ignore_index=-100, reduction="sum")
        sums.append(torch.stack([nats, (logits_TV.argmax(-1) == targets_T).sum()]))
    return torch.stack(sums)


def _of_all_sources(sums: Tensor, num_bytes: Mapping[str, int]) -> Validation:
    total = _summary(sums.sum(0), sum(num_bytes.values()))
    if len(num_bytes) == 1:
        return total
    sources = {name: _summary(part, num_bytes[name]) for name, part in zip(num_bytes, sums, strict=True)}
    return replace(total, sources=sources)


def _summary(sums: Tensor, num_bytes: int) -> Validation:
    nats, hits, tokens = sums.tolist()
    loss = nats / tokens
    return Validation(
        loss=loss,
        bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else math.nan,
        perplexity=math.exp(min(loss, 700.0)),
        token_accuracy=hits / tokens,
        num_tokens=int(tokens),
    )
