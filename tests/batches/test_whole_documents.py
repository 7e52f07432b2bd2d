"""Windows of whole documents: each document stands in one of them, uncut, and only what is learned is a label."""

import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gpt2x.batches.loader import TrainingBatches, check_unchanged
from gpt2x.batches.mixture import open_mixture
from gpt2x.batches.order import GlobalOrder, Phase
from gpt2x.batches.source import ShardSource
from gpt2x.batches.whole_documents import pack
from gpt2x.config import CorpusSection, DataSection, StreamSection
from gpt2x.errors import UserError
from gpt2x.shards.token_sets import open_tokens

EOS, LENGTH, PER_STEP = 7, 12, 24
SHARDS = [[3, 12, 1, 5, 7, 2], [12], [4, 4, 11, 1, 1, 6, 9, 3]]
MANY = [[length for length in (3, 12, 1, 5, 7, 2, 9, 4, 6, 11, 8, 10) for _ in range(10)]]


def whole_documents(tokens, sequence_length, **options):
    return ShardSource(tokens, sequence_length, packing="whole_documents", **options)


def arrays(index, split="train"):
    """Per shard its tokens, its document bounds and its targets, as the safetensors library loads them."""
    return [load_file(index.directory / split / entry.file) for entry in index.splits[split]]


def documents(index, split="train"):
    """Of every document its ids, and its labels when it stands in a window: its first token is none."""
    found = []
    for shard in arrays(index, split):
        targets = shard.get("targets", np.ones(len(shard["tokens"])))
        for start, end in zip(shard["documents"][:-1].tolist(), shard["documents"][1:].tolist()):
            ids = shard["tokens"][start:end].tolist()
            is_learned = [False, *(targets[start + 1 : end] == 1).tolist()]
            found.append((ids, [token if learned else -100 for token, learned in zip(ids, is_learned)]))
    return found


def cut(ids, labels, position_ids):
    """A window's documents as its positions tell them apart, each with its labels."""
    begins = [place for place, position in enumerate(position_ids) if position == 0]
    assert position_ids == [place - max(b for b in begins if b <= place) for place in range(len(ids))]
    bounds = zip(begins, [*begins[1:], len(ids)])
    return [(ids[start:end], labels[start:end]) for start, end in bounds]


def all_windows(source):
    found = source.windows.sequences(np.arange(source.num_windows))
    return [cut(*window) for window in zip(*(array.tolist() for array in found))]


def best_fit_decreasing(lengths, capacity):
    """One document after the other, the longest first, into the window in which it leaves the least room."""
    windows = []
    for length in sorted(lengths, reverse=True):
        fitting = [window for window in windows if capacity - sum(window) >= length]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            windows.append([length])
    return sorted(capacity - sum(window) for window in windows)


@pytest.mark.parametrize("seed", range(12))
def test_packing_leaves_the_room_that_best_fit_decreasing_leaves(seed):
    generator = np.random.default_rng(seed)
    capacity = int(generator.integers(1, 60))
    lengths = generator.integers(1, capacity + 1, generator.integers(1, 200))
    order, ends = pack(lengths, capacity)
    assert sorted(order.tolist()) == list(range(lengths.size))
    rooms = [capacity - lengths[order[start:end]].sum() for start, end in itertools.pairwise(ends)]
    assert sorted(rooms) == best_fit_decreasing(lengths.tolist(), capacity)


def test_packing_is_the_same_in_every_version():
    order, ends = pack(np.array([3, 9, 1, 4, 4, 7, 2, 5, 4, 1, 6, 4]), 10)
    assert order.tolist() == [1, 2, 0, 5, 3, 10, 4, 7, 9, 6, 8, 11]
    assert ends.tolist() == [0, 2, 4, 6, 9, 12]


def test_packing_half_a_million_conversations_fills_the_windows_in_four_bytes_for_each():
    """Lengths as conversations have them: a median of 245 tokens, the longest cut at 1024."""
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 500_000).clip(4, 1024).astype(np.int64)
    order, ends = pack(lengths, 1024)
    assert lengths.sum() / (1024 * (ends.size - 1)) > 0.999
    assert order.nbytes == 4 * lengths.size


@pytest.mark.parametrize("learned", [None, 0.5])
def test_every_document_stands_whole_in_one_window_and_sees_itself_alone(make_index, learned):
    index = make_index(SHARDS, learned=learned)
    source = whole_documents(index, LENGTH)
    found = [part for window in all_windows(source) for part in window]
    expected = documents(index)
    filled = [ids for ids, labels in found if (ids, labels) not in expected]
    assert Counter(map(str, found)) - Counter(map(str, expected)) == Counter(
        str(([EOS] * len(ids), [-100] * len(ids))) for ids in filled
    )
    assert Counter(map(str, expected)) - Counter(map(str, found)) == Counter()
    assert source.num_tokens == sum(map(sum, SHARDS))


def test_what_is_left_of_a_window_is_ends_of_text_that_nobody_learns(make_index):
    source = whole_documents(make_index([[5]]), LENGTH)
    (window,) = all_windows(source)
    assert window[1] == ([EOS] * 7, [-100] * 7)


def test_windows_may_be_none(make_index):
    found = whole_documents(make_index(SHARDS), LENGTH).sequences(np.array([], np.int64))
    assert [array.shape for array in found] == [(0, LENGTH)] * 3


def test_each_epoch_gives_every_window_once_in_another_order(make_index):
    source = whole_documents(make_index(MANY), LENGTH, seed=5)
    windows = source.windows.sequences(np.arange(source.num_windows)).ids.tolist()
    epochs = [source.sequences(np.arange(source.num_windows) + epoch * source.num_windows) for epoch in (0, 1)]
    assert sorted(epochs[0].ids.tolist()) == sorted(epochs[1].ids.tolist()) == sorted(windows)
    assert epochs[0].ids.tolist() != epochs[1].ids.tolist()
    assert source.epochs(2 * source.num_windows) == 2.0


def test_the_windows_are_the_same_for_every_seed_and_name(make_index):
    index = make_index(MANY)
    sources = [whole_documents(index, LENGTH, seed=seed, name=name) for seed, name in [(0, "a"), (1, "b")]]
    assert all_windows(sources[0]) == all_windows(sources[1])


def test_another_packing_is_another_source_for_a_run_that_goes_on(make_index):
    index = make_index(MANY)
    cut, whole = ShardSource(index, LENGTH), whole_documents(index, LENGTH)
    saved = json.loads(json.dumps(batches([cut]).state(4)))
    check_unchanged(saved, [cut], seed=3, sequence_length=LENGTH)
    with pytest.raises(UserError, match=r"source 'train' has changed .*; restore it \(and data.packing, data.align"):
        check_unchanged(saved, [whole], seed=3, sequence_length=LENGTH)


def test_a_run_that_goes_on_with_windows_aligned_otherwise_is_refused(make_index):
    index = make_index(MANY)
    plain, aligned = (ShardSource(index, LENGTH, align_documents=aligned) for aligned in (False, True))
    saved = json.loads(json.dumps(batches([plain]).state(4)))
    check_unchanged(saved, [plain], seed=3, sequence_length=LENGTH)
    with pytest.raises(UserError, match=r"source 'train' has changed since the checkpoint was made"):
        check_unchanged(saved, [aligned], seed=3, sequence_length=LENGTH)


def batches(sources, micro_batch_size=PER_STEP, rank=0, num_processes=1, **options):
    phase = Phase(sequences_per_step=PER_STEP, weights={source.name: 1.0 for source in sources})
    order = GlobalOrder(3, [phase])
    return TrainingBatches(
        order, sources, micro_batch_size=micro_batch_size, rank=rank, num_processes=num_processes, **options
    )


def rows(*parts):
    """The sequences of batches, one after the other: ids, labels and positions of each."""
    micro_batches = [micro_batch for part in parts for micro_batch in part.micro_batches]
    names = ("input_ids", "labels", "position_ids")
    return [row for batch in micro_batches for row in zip(*(batch[name].tolist() for name in names), strict=True)]


@pytest.mark.parametrize(("num_processes", "micro_batch_size"), [(1, 8), (2, 12), (3, 4), (4, 1), (24, 1)])
def test_a_step_is_the_same_for_every_number_of_processes_and_micro_batches(
    make_index, num_processes, micro_batch_size
):
    sources = [
        whole_documents(make_index(MANY, name="plain"), LENGTH, name="plain"),
        whole_documents(make_index(MANY, name="chat", learned=0.5), LENGTH, name="chat"),
    ]
    ranks = [batches(sources, micro_batch_size, rank, num_processes) for rank in range(num_processes)]
    for step in (0, 7):
        whole = batches(sources).step(step)
        parts = [rank.step(step) for rank in ranks]
        assert rows(*parts) == rows(whole)
        assert sum(part.checksum for part in parts) == whole.checksum


def test_a_step_holds_the_documents_of_its_draws(make_index):
    index = make_index(MANY, learned=0.5)
    source = whole_documents(index, LENGTH)
    windows = list(map(str, all_windows(source)))
    for row in rows(batches([source]).step(2)):
        assert str(cut(*row)) in windows


def test_a_place_of_a_step_names_its_documents(make_index):
    index = make_index([[3, 4], [2, 1]], learned=0.5)
    source = whole_documents(index, LENGTH)
    files = [index.directory / "train" / entry.file for entry in index.splits["train"]]
    assert source.num_windows == 1
    assert source.locate(3) == f"epoch 3, {files[0]}, documents 0, 1; {files[1]}, documents 0, 1"


def test_a_place_of_a_later_window_names_its_documents(make_index):
    index = make_index(SHARDS)
    source = whole_documents(index, LENGTH)
    for draw in range(source.num_windows):
        located, everything = [], arrays(index)
        for part in source.locate(draw).removeprefix("epoch 0, ").split("; "):
            file, numbers = re.fullmatch(r"(.*), documents ([\d, ]+)", part).groups()
            shard = next(a for a, e in zip(everything, index.splits["train"]) if file.endswith(e.file))
            for number in map(int, numbers.split(", ")):
                located += shard["tokens"][shard["documents"][number] : shard["documents"][number + 1]].tolist()
        assert source.sequences(np.array([draw])).ids[0, : len(located)].tolist() == located


@pytest.mark.parametrize(
    ("learned", "remedy"),
    [
        (None, r"set data.packing to documents, which cuts them, "),
        (0.5, r"prepare them again with chat.max_length 12, "),
    ],
)
def test_a_document_longer_than_a_window_is_refused(make_index, learned, remedy):
    index = make_index([[9], [3, 13, 20]], learned=learned)
    complaint = r"_00001.safetensors: document 1 has 13 tokens, and data.sequence_length \(12\) must hold it whole; "
    with pytest.raises(UserError, match=f"{complaint}{remedy}or set 20 if the model takes that many\\.$"):
        whole_documents(index, LENGTH)


@pytest.mark.parametrize(
    ("make", "lengths", "learned"),
    [
        (ShardSource, [20, 30], 0.0),
        (whole_documents, [12, 12], 0.0),
        (whole_documents, [1] * 20, 1.0),  # nothing of its own stands before the first token
        (whole_documents, [1] * 20, None),
    ],
)
def test_a_source_of_which_nothing_is_learned_is_refused(make_index, make, lengths, learned):
    index = make_index([lengths], learned=learned)
    complaint = r"source 'chat': no token of the train documents of .* is learned; .*, or set chat.learn to all\."
    with pytest.raises(UserError, match=complaint):
        make(index, LENGTH, name="chat")


def test_a_window_of_which_nothing_is_learned_is_a_window_like_the_others(make_index):
    source = whole_documents(make_index([[12, *[1] * 12]]), LENGTH)
    assert (source.sequences(np.arange(2)).labels != -100).sum(axis=1).tolist() in ([0, 11], [11, 0])


def test_streams_are_refused(tmp_path):
    stream = StreamSection(
        corpus=CorpusSection(kind="dataset", dataset="json", data_files=["a.jsonl"]),
        tokenizer=str(tmp_path),
        cache_dir=tmp_path,
    )
    data = DataSection(stream=stream, sequence_length=LENGTH, packing="whole_documents")
    complaint = (
        r"data.packing \(whole_documents\) is not made for streams, .*; set it to documents, or prepare the cor"
    )
    with pytest.raises(UserError, match=complaint):
        open_mixture(data, seed=0)


def test_token_files_of_other_projects_are_packed_by_their_ends_of_text(tmp_path):
    vocabulary = {f"w{number}": number for number in range(1, 300)} | {"<|endoftext|>": 0}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>")),
        eos_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = [[1, 2, 3, 0], [4, 0], [5, 6, 7, 8, 9, 0], [10]]
    np.array(list(itertools.chain(*texts)), np.uint16).tofile(tmp_path / "train.bin")
    source = whole_documents(open_tokens(str(tmp_path / "train.bin"), tokenizer=str(tmp_path / "tokenizer")), 6)
    found = [part for window in all_windows(source) for part in window]
    for ids in texts:
        assert (ids, [-100, *ids[1:]]) in found
    assert len(found) - len(texts) == sum(ids == [0] * len(ids) for ids, _ in found) <= source.num_windows == 3


@pytest.mark.parametrize("align_documents", [False, True])
def test_what_a_conversation_does_not_teach_is_no_label_in_other_packings_either(make_index, align_documents):
    index = make_index([[20, 13, 30], [5, 40, 26]], learned=0.5)
    source = ShardSource(index, LENGTH, align_documents=align_documents)
    found, plain = source.sequences(np.arange(source.num_windows)), {}
    for shard in arrays(index):
        for start in range(len(shard["tokens"]) - LENGTH + 1):
            ids, learned = (shard[name][start : start + LENGTH] for name in ("tokens", "targets"))
            plain[str(ids.tolist())] = np.where(learned == 1, ids.astype(int), -100).tolist()
    for ids, labels in zip(found.ids.tolist(), found.labels.tolist(), strict=True):
        assert labels == plain[str(ids)]


def test_conversations_are_masked_at_their_bounds_and_not_at_the_end_of_every_turn(make_index):
    """Their end of text ends a turn: a document begins with its own first token, which nothing predicts."""
    index = make_index([[20, 13, 30], [5, 40, 100]], learned=0.5)
    source = ShardSource(index, LENGTH)
    begins, of_window = set(), {}
    for number, shard in enumerate(arrays(index)):
        begins |= {(number, start) for start in shard["documents"][:-1].tolist()}
        for start in range(0, len(shard["tokens"]) - LENGTH + 1, LENGTH):
            of_window[str(shard["tokens"][start : start + LENGTH].tolist())] = number, start
    loader = TrainingBatches(
        GlobalOrder(0, [Phase(sequences_per_step=12, weights={"train": 1.0})]),
        [source],
        micro_batch_size=12,
        mask_documents_at=EOS,
    )
    for ids, labels, positions in rows(loader.step(0)):
        number, start = of_window[str(ids)]
        expected = [0]
        for place in range(1, LENGTH):
            expected.append(0 if (number, start + place) in begins else expected[-1] + 1)
        assert positions == expected
        assert all(label == -100 for label, place in zip(labels, range(LENGTH)) if (number, start + place) in begins)
        assert EOS in ids[1:]


def test_a_source_without_a_mask_is_learned_whole_beside_one_with_a_mask(make_index):
    sources = [
        ShardSource(make_index([[200]], name="plain"), LENGTH, name="plain"),
        ShardSource(make_index([[200]], name="chat", learned=0.5), LENGTH, name="chat"),
    ]
    loader = batches(sources, micro_batch_size=8)
    names = {}
    for name, (places, _) in loader.order.samples(0, 0, PER_STEP).items():
        names |= dict.fromkeys(places.tolist(), name)
    parts = loader.step(0).micro_batches
    pairs = [pair for part in parts for pair in zip(part["input_ids"].tolist(), part["labels"].tolist())]
    assert {names[place] for place, (ids, labels) in enumerate(pairs) if ids == labels} == {"plain"}
    assert {names[place] for place, (ids, labels) in enumerate(pairs) if ids != labels} == {"chat"}
    assert "position_ids" not in parts[0]


def test_where_everything_is_learned_labels_are_the_ids_themselves(make_index):
    (part,) = batches([ShardSource(make_index([[400]]), LENGTH)]).step(0).micro_batches
    assert part["labels"] is part["input_ids"]
