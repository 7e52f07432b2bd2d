"""From the recipe's data section to open sources: what a run trains on, and what it is validated on."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpt2x.batches.source import ShardSource, Source, open_files
from gpt2x.batches.stream import StreamSource
from gpt2x.batches.validation import HeldOut
from gpt2x.config import DataSection, SourceSection
from gpt2x.errors import UserError
from gpt2x.shards.token_sets import TokenSet


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The open sources of a run.

    Attributes:
        sources: what is trained on.
        weights: each source's share by its name, up to a common factor.
        held_out: what is validated on, by the names of the sources that hold something out.
        tokenizer_dir: the tokenizer that made the ids, with the chat template where a source has one.
        tokenizer_fingerprint: of it; None where the files do not say.
        vocab_size: every id is below it.
    """

    sources: tuple[Source, ...]
    weights: Mapping[str, float]
    held_out: Mapping[str, HeldOut]
    tokenizer_dir: str | Path
    tokenizer_fingerprint: str | None
    vocab_size: int


class _Opened(NamedTuple):
    source: Source
    tokens: TokenSet | StreamSource
    """What says where the ids are and which tokenizer made them."""
    held_out: Callable[[], HeldOut | None]
    """A stream's are there when its first shard is: all streams begin before one is waited for."""


def open_mixture(
    data: DataSection,
    *,
    seed: int,
    files: Mapping[str, ShardSource] | None = None,
    states: Mapping[str, Mapping[str, Any]] | None = None,
    fills_streams: bool = True,
) -> Mixture:
    """Opens every source and checks that they belong together.

    Args:
        data: what to open.
        seed: of the order of the draws.
        files: the sources that are no streams, by their names, where they are open already.
        states: where streams go on, by the sources' names, as Source.state gave it.
        fills_streams: whether this process fills the streams' caches, or reads what another of its node fills.

    Raises:
        UserError: for whatever is wrong with a source, for sources of different tokenizers, and where nothing is
            held out.
    """
    opened: list[_Opened] = []
    try:
        for section in data.mixture:
            if section.stream is None:
                opened.append(_of_files((files or {}).get(section.key) or open_files(section, data, seed=seed)))
            else:
                state = (states or {}).get(section.key)
                opened.append(_open_stream(section, data, seed=seed, state=state, fills=fills_streams))
        return _joined(data, opened)
    except BaseException:
        for found in opened:
            found.source.close()
        raise


def _joined(data: DataSection, opened: Sequence[_Opened]) -> Mixture:
    _check_tokenizers(opened)
    held_out = {found.source.name: part for found in opened if (part := found.held_out()) is not None}
    if not held_out:
        raise UserError(
            f"{opened[0].tokens.location} holds no validation tokens; prepare it again with "
            f"corpus.validation_fraction above 0, or name held-out token files by data.validation_path."
        )
    sources = tuple(found.source for found in opened)
    return Mixture(
        sources=sources,
        weights=_weights(data.mixture, sources),
        held_out=held_out,
        tokenizer_dir=_tokenizer_dir(opened),
        tokenizer_fingerprint=next(
            (fingerprint for f in opened if (fingerprint := f.tokens.tokenizer_fingerprint)), None
        ),
        vocab_size=max(found.tokens.vocab_size for found in opened),
    )


def _of_files(source: ShardSource) -> _Opened:
    tokens = source.tokens
    return _Opened(
        source=source,
        tokens=tokens,
        held_out=lambda: HeldOut.of(tokens) if tokens.has_split("validation") else None,
    )


def _open_stream(
    section: SourceSection, data: DataSection, *, seed: int, state: Mapping[str, Any] | None, fills: bool
) -> _Opened:
    assert section.stream is not None
    if data.align_documents:
        raise UserError("data.align_documents is not made for streams; set it to false, or prepare the corpus.")
    if data.packing == "whole_documents":
        raise UserError(
            "data.packing (whole_documents) is not made for streams, which are packed as they come; set it to "
            "documents, or prepare the corpus."
        )
    source = StreamSource(
        section.stream, data.sequence_length, seed=seed, name=section.key, fills=fills, state=state or None
    )
    return _Opened(source=source, tokens=source, held_out=lambda: _held_out_of(source))


def _held_out_of(source: StreamSource) -> HeldOut | None:
    if not source.section.corpus.validation_fraction:
        return None
    shards, num_bytes = source.validation_shards()
    return HeldOut(shards=shards, num_bytes=num_bytes, eos_token_id=source.eos_token_id)


def _check_tokenizers(opened: Sequence[_Opened]) -> None:
    first = opened[0]
    for other in opened:
        found, wanted = other.tokens.tokenizer_fingerprint, first.tokens.tokenizer_fingerprint
        differ = found is not None and wanted is not None and found != wanted
        if differ or other.tokens.eos_token_id != first.tokens.eos_token_id:
            raise UserError(
                f"source {other.source.name!r} ({other.tokens.location}) was made by another tokenizer than "
                f"{first.source.name!r} ({first.tokens.location}); prepare one of them again with the other's "
                f"tokenizer."
            )


def _tokenizer_dir(opened: Sequence[_Opened]) -> str | Path:
    """The first tokenizer that has a chat template, or else the first: their fingerprints say nothing of templates."""
    known = [(found, directory) for found in opened if (directory := found.tokens.tokenizer_dir) is not None]
    if not known:
        raise UserError(
            f"{opened[0].tokens.location} does not say which tokenizer made it; name its directory by data.tokenizer."
        )
    if len(known) == 1:
        return known[0][1]
    templates = {directory: _chat_template(directory) for _, directory in known}
    with_template = [(found, directory) for found, directory in known if templates[directory]]
    for other, directory in with_template:
        first, first_dir = with_template[0]
        if templates[directory] != templates[first_dir]:
            raise UserError(
                f"source {other.source.name!r} ({other.tokens.location}) has another chat template than "
                f"{first.source.name!r} ({first.tokens.location}); prepare one of them again with the other's "
                f"chat.template."
            )
    return (with_template or known)[0][1]


def _chat_template(tokenizer_dir: str | Path) -> Any:
    """A tokenizer's chat template, or several of them by name; None where it has none."""
    directory = Path(tokenizer_dir)
    if not directory.is_dir():
        from gpt2x.tokenizers.bpe import load_tokenizer  # imports transformers

        return load_tokenizer(tokenizer_dir).chat_template
    template, settings = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if template.is_file():
        return template.read_text(encoding="utf-8")
    return json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None


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
