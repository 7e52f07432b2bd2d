"""From the recipe's data section to open sources: what a run trains on, and what it is validated on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2x.batches.source import ShardSource, Source, tokens_of
from gpt2x.batches.validation import HeldOut
from gpt2x.config import DataSection, SourceSection
from gpt2x.errors import UserError
from gpt2x.shards.tokens import TokenSet


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The open sources of a run.

    Attributes:
        sources: what is trained on.
        weights: each source's share by its name, up to a common factor.
        held_out: what is validated on, of all sources that hold something out.
        tokenizer_dir: the tokenizer that made the ids.
        tokenizer_fingerprint: of it; None where the files do not say.
        vocab_size: every id is below it.
    """

    sources: tuple[Source, ...]
    weights: Mapping[str, float]
    held_out: HeldOut
    tokenizer_dir: str | Path
    tokenizer_fingerprint: str | None
    vocab_size: int


def open_mixture(
    data: DataSection,
    *,
    seed: int,
    states: Mapping[str, Mapping[str, Any]] | None = None,
    fills_streams: bool = True,
) -> Mixture:
    """Opens every source and checks that they belong together.

    Args:
        data: what to open.
        seed: of the order of the draws.
        states: where streams go on, by the sources' names, as Source.state gave it.
        fills_streams: whether this process fills the streams' caches, or reads what another of its node fills.

    Raises:
        UserError: for whatever is wrong with a source, for sources of different tokenizers, and where nothing is
            held out.
    """
    opened = [
        _open(section, data, seed=seed, state=(states or {}).get(section.key), fills_streams=fills_streams)
        for section in data.mixture
    ]
    sources, token_sets = tuple(source for source, _ in opened), [tokens for _, tokens in opened]
    _check_tokenizers(sources, token_sets)
    held_out = [HeldOut.of(tokens) for tokens in token_sets if tokens.has_split("validation")]
    if not held_out:
        raise UserError(
            f"{token_sets[0].location} holds no validation tokens; prepare it again with corpus.validation_fraction "
            f"above 0, or name held-out token files by data.validation_path."
        )
    tokenizers = [tokens for tokens in token_sets if tokens.tokenizer_dir is not None]
    if not tokenizers:
        raise UserError(
            f"{token_sets[0].location} does not say which tokenizer made it; name its directory by data.tokenizer."
        )
    return Mixture(
        sources=sources,
        weights=_weights(data.mixture, sources),
        held_out=HeldOut.joined(held_out),
        tokenizer_dir=tokenizers[0].tokenizer_dir or "",
        tokenizer_fingerprint=next((t.tokenizer_fingerprint for t in tokenizers if t.tokenizer_fingerprint), None),
        vocab_size=max(tokens.vocab_size for tokens in token_sets),
    )


def _open(
    section: SourceSection, data: DataSection, *, seed: int, state: Mapping[str, Any] | None, fills_streams: bool
) -> tuple[Source, TokenSet]:
    if section.stream is not None:
        raise NotImplementedError
    tokens = tokens_of(section)
    source = ShardSource(
        tokens,
        data.sequence_length,
        seed=seed,
        name=section.key,
        align_documents=data.align_documents,
    )
    return source, tokens


def _check_tokenizers(sources: Sequence[Source], token_sets: Sequence[TokenSet]) -> None:
    first = token_sets[0]
    for source, tokens in zip(sources, token_sets, strict=True):
        found, wanted = tokens.tokenizer_fingerprint, first.tokenizer_fingerprint
        differ = found is not None and wanted is not None and found != wanted
        if differ or tokens.eos_token_id != first.eos_token_id:
            raise UserError(
                f"source {source.name!r} ({tokens.location}) was made by another tokenizer than {sources[0].name!r} "
                f"({first.location}); prepare one of them again with the other's tokenizer."
            )


def _weights(sections: Sequence[SourceSection], sources: Sequence[Source]) -> dict[str, float]:
    """The given weights; where none is given, the sources' sizes."""
    given = [section.weight for section in sections]
    if len(sources) == 1 or all(weight is not None for weight in given):
        return {source.name: float(weight or 1) for source, weight in zip(sources, given, strict=True)}
    unknown = [source.name for source in sources if source.num_windows is None]
    without = [source.name for source, weight in zip(sources, given, strict=True) if weight is None]
    if unknown or any(weight is not None for weight in given):
        raise UserError(
            f"source {(unknown or without)[0]!r} needs a weight: either every source has one or none, and a stream's "
            f"size is not known; set its weight in data.sources."
        )
    return {source.name: float(source.num_windows or 0) for source in sources}
