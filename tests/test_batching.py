"""Every token is a target exactly once an epoch, in every mode, and any position can be resumed."""

from __future__ import annotations

from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.config import DataConfig
from pocketlm.data import batching
from pocketlm.data.corpora import open_corpus
from pocketlm.data.loader import IGNORE, Batch, Loader, Position
from pocketlm.data.shards import Shard, TokenSplit, prepare
from pocketlm.errors import ConfigError, CorpusError
from pocketlm.tokenizers import build_bytes

MODES = ("stream", "pack", "bucket", "pad")
SEPARATOR = 0


def split_of(lengths: list[int], cut: int = 0) -> TokenSplit:
    """Documents of these lengths in two shards. Every id but the separator is its own index in the stream, so a
    batch shows which tokens it holds."""
    starts = np.cumsum([1, *(n + 1 for n in lengths)])[:-1]
    ids = np.arange(sum(lengths) + len(lengths) + 1, dtype=np.uint32)
    ids[[*(starts - 1), -1]] = SEPARATOR
    parts = []
    for part in (ids[:cut], ids[cut:]):
        parts.append(Shard(Path(), len(part), "<u4", ""))
        parts[-1].__dict__["tokens"] = part
    return TokenSplit("train", tuple(parts), starts, SEPARATOR, 0, 0, 0)


def epoch_of(loader: Loader, epoch: int) -> list[Batch]:
    return [batch for batch, _ in islice(loader.batches(Position(epoch)), loader.batches_in_epoch(epoch))]


@st.composite
def loaders(draw, modes=MODES) -> tuple[TokenSplit, Loader]:
    lengths = draw(st.lists(st.integers(0, 30), min_size=1, max_size=25))
    n_stored = sum(lengths) + len(lengths) + 1
    split = split_of(lengths, cut=draw(st.integers(0, n_stored - 1)))
    loader = Loader(
        split,
        mode=draw(st.sampled_from(modes)),
        block_size=draw(st.integers(1, min(12, n_stored - 1))),
        batch_size=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 2**31)),
        shuffle=draw(st.booleans()),
    )
    return split, loader


# ---------------------------------------------------------------- targets


@settings(max_examples=300)
@given(loaders(), st.integers(0, 3))
def test_every_token_is_a_target_exactly_once_an_epoch(made, epoch):
    split, loader = made
    stored = split.read(0, split.n_stored).astype(np.int64)
    seen = np.zeros(split.n_stored, dtype=int)
    n_separators = 0
    for batch in epoch_of(loader, epoch):
        real = batch.targets != IGNORE
        assert batch.n_targets == int(real.sum())
        targets, inputs = batch.targets[real].numpy(), batch.inputs[real].numpy()
        ids = targets[targets != SEPARATOR]
        seen[ids] += 1
        n_separators += int((targets == SEPARATOR).sum())
        assert np.array_equal(inputs[targets != SEPARATOR], stored[ids - 1]), "the input is the token before the target"
        after = inputs[(targets == SEPARATOR) & (inputs != SEPARATOR)] + 1
        assert (stored[after] == SEPARATOR).all()
    assert (seen[1:][stored[1:] != SEPARATOR] == 1).all()
    assert n_separators == split.n_documents
    assert seen.sum() + n_separators == split.n_stored - 1


@given(loaders())
def test_rows_are_padded_on_the_right_and_their_inputs_are_ids(made):
    for batch in epoch_of(made[1], 0):
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs.shape == batch.targets.shape
        real = (batch.targets != IGNORE).int()
        assert (real.diff(dim=1) <= 0).all(), "nothing real after padding"
        assert (batch.inputs >= 0).all()
        assert (batch.inputs[real == 0] == SEPARATOR).all()


@given(loaders(modes=("pack", "bucket", "pad")))
def test_context_never_crosses_a_documents_edge(made):
    """Within a row, and in mode pack within a document of it, inputs follow each other in the stream."""
    split, loader = made
    stored = split.read(0, split.n_stored)
    for batch in epoch_of(loader, 0):
        documents = batch.document_ids if batch.document_ids is not None else torch.zeros_like(batch.inputs)
        for inputs, targets, ids in zip(batch.inputs, batch.targets, documents, strict=True):
            for document in ids.unique().tolist():
                here = (ids == document) & (targets != IGNORE)
                x, y = inputs[here].tolist(), targets[here].tolist()
                assert x[1:] == y[:-1]
                assert SEPARATOR not in x[1:], "a separator only starts a document"
                if x and x[0] != SEPARATOR:
                    assert stored[x[0]] == x[0], "a later piece of a long document"


@given(loaders(modes=("pack",)))
def test_documents_in_a_packed_row_have_numbers_of_their_own(made):
    for batch in epoch_of(made[1], 0):
        assert batch.document_ids.dtype == torch.int32
        for targets, ids in zip(batch.targets, batch.document_ids, strict=True):
            assert ids[0] == 0
            assert set(ids.diff().tolist()) <= {0, 1}
            padding = ids[targets == IGNORE]
            assert padding.unique().numel() <= 1
            assert not set(padding.tolist()) & set(ids[targets != IGNORE].tolist())


def test_a_known_text_gives_known_batches():
    split = split_of([3, 1])  # 0 1 2 3 0 5 0
    loader = Loader(split, mode="pad", block_size=4, batch_size=2, seed=0, shuffle=False)
    (batch,) = epoch_of(loader, 0)
    assert batch.inputs.tolist() == [[0, 1, 2, 3], [0, 5, 0, 0]]
    assert batch.targets.tolist() == [[1, 2, 3, 0], [5, 0, IGNORE, IGNORE]]
    loader = Loader(split, mode="pack", block_size=6, batch_size=2, seed=0, shuffle=False)
    (batch,) = epoch_of(loader, 0)
    assert batch.inputs.tolist() == [[0, 1, 2, 3, 0, 5]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0, 1, 1]]
    loader = Loader(split, mode="stream", block_size=4, batch_size=2, seed=0, shuffle=False)
    (batch,) = epoch_of(loader, 0)
    assert batch.targets.tolist() == [[1, 2, 3, 0], [5, 0, IGNORE, IGNORE]]


# ---------------------------------------------------------------- order and resuming


@settings(max_examples=100)
@given(loaders(), st.data())
def test_batches_go_on_at_any_position_as_if_never_interrupted(made, data):
    _, loader = made
    steps = data.draw(st.integers(1, 2 * loader.batches_in_epoch(0) + 2))
    reference = list(islice(loader.batches(Position()), steps + 3))
    _, position = reference[steps - 1]
    position = Position(**asdict(position))
    for (one, after), (other, after_other) in zip(reference[steps:], loader.batches(position), strict=False):
        assert after == after_other
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)
        assert one.document_ids is None or torch.equal(one.document_ids, other.document_ids)


@pytest.mark.parametrize("mode", MODES)
def test_order_changes_with_epoch_and_seed_and_with_nothing_else(mode):
    split = split_of([i % 17 for i in range(300)])

    def order(seed: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
        loader = Loader(split, mode=mode, block_size=16, batch_size=4, seed=seed, shuffle=shuffle)
        return [batch.targets.flatten().tolist() for batch in epoch_of(loader, epoch)]

    assert order(1, 0) == order(1, 0)
    assert len({str(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert order(1, 0, shuffle=False) == order(2, 5, shuffle=False)


def test_windows_of_a_stream_begin_elsewhere_each_epoch():
    split = split_of([5000])
    loader = Loader(split, mode="stream", block_size=100, batch_size=1, seed=0)
    phases = {min(int(b.targets[0, 0]) for b in epoch_of(loader, e) if b.n_targets == 100) % 100 for e in range(8)}
    assert len(phases) > 4


@given(loaders(), st.integers(0, 2))
def test_the_epochs_length_is_known_beforehand(made, epoch):
    _, loader = made
    positions = [position for _, position in islice(loader.batches(Position(epoch)), loader.batches_in_epoch(epoch))]
    assert positions[-1] == Position(epoch + 1, 0)
    assert positions[:-1] == [Position(epoch, i + 1) for i in range(len(positions) - 1)]


# ---------------------------------------------------------------- cells


@given(loaders(), st.integers(0, 2))
def test_the_useful_share_is_that_of_the_batches(made, epoch):
    _, loader = made
    batches = epoch_of(loader, epoch)
    cells = sum(batch.targets.numel() for batch in batches)
    assert loader.useful_share(epoch) == pytest.approx(sum(batch.n_targets for batch in batches) / cells)


@given(loaders(modes=("bucket",)))
def test_buckets_stay_within_their_budget_and_fit_their_longest(made):
    _, loader = made
    for batch in epoch_of(loader, 0):
        assert batch.targets.numel() <= loader._batch_size * loader._block_size
        assert (batch.targets[:, -1] != IGNORE).any(), "no column is padding only"


@settings(max_examples=200)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 60))
def test_best_fit_equals_a_plain_search_of_all_rows(lengths, width):
    lengths.sort(reverse=True)
    free: list[int] = []
    for length, row in zip(lengths, batching.best_fit(lengths, width), strict=True):
        fitting = [space for space in free if space >= length]
        if row == len(free):
            assert not fitting, "a new row only where no other has room"
            free.append(width)
        else:
            assert free[row] == min(fitting), "the fullest that has room"
        free[row] -= length
    assert min(free) >= 0


def test_whole_documents_are_packed_tighter_than_padded():
    split = split_of(np.random.default_rng(0).integers(0, 100, 500).tolist())
    share = {mode: Loader(split, mode=mode, block_size=64, batch_size=8, seed=0).useful_share() for mode in MODES}
    assert share["pad"] < 0.75 < 0.98 < share["pack"]
    assert share["bucket"] > 0.95
    assert share["stream"] > 0.99


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 20))
def test_pieces_cover_documents_without_gaps(lengths, width):
    starts = np.cumsum([1, *lengths])
    pieces = batching.pieces_of_documents(starts[:-1], int(starts[-1]), width)
    assert pieces[0, 0] == 1
    assert pieces[-1, 1] == starts[-1]
    assert (pieces[1:, 0] == pieces[:-1, 1]).all()
    assert np.diff(pieces).max() <= width
    assert set(starts[:-1].tolist()) <= set(pieces[:, 0].tolist())
    assert len(pieces) == sum(-(-n // width) for n in lengths)


# ---------------------------------------------------------------- files, and too little of them


@pytest.mark.parametrize("mode", MODES)
def test_batches_hold_the_text_of_the_corpus(mode, book, tmp_path):
    corpus = open_corpus(DataConfig(path=str(book), document="line"), mirror=None)
    split = prepare(corpus, build_bytes(), tmp_path / "cache", shard_tokens=1000).splits["train"]
    loader = Loader(split, mode=mode, block_size=32, batch_size=4, seed=0)
    targets = torch.cat([b.targets[b.targets != IGNORE] for b in epoch_of(loader, 0)])
    expected = "".join(corpus.documents("train")).encode()
    counts = torch.bincount(targets, minlength=257)
    assert counts[:256].tolist() == np.bincount(np.frombuffer(expected, dtype=np.uint8), minlength=256).tolist()
    assert counts[256] == split.n_documents


@pytest.mark.parametrize("mode", MODES)
def test_a_split_shorter_than_a_window_is_refused_with_both_numbers(mode):
    Loader(split_of([14]), mode=mode, block_size=15, batch_size=1, seed=0)
    with pytest.raises(CorpusError, match=r"train split has 15 tokens.* window of 15.*--training\.window"):
        Loader(split_of([13]), mode=mode, block_size=15, batch_size=1, seed=0)


# ---------------------------------------------------------------- accumulation windows and processes


@st.composite
def windows(draw) -> tuple[TokenSplit, Loader, int, int, int]:
    """(split, loader, micro-batches a window, processes, windows looked at)."""
    split, loader = draw(loaders())
    world = draw(st.integers(1, 4))
    return split, loader, world * draw(st.integers(1, 3)), world, draw(st.integers(1, 6))


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.n_targets == y.n_targets
        assert torch.equal(x.inputs, y.inputs) and torch.equal(x.targets, y.targets)
        assert (x.document_ids is None) == (y.document_ids is None)
        assert x.document_ids is None or torch.equal(x.document_ids, y.document_ids)


def of_all_ranks(loader: Loader, start: Position, n: int, world: int, count: int):
    """The windows of ``world`` processes put together: (micro-batches in order, position after)."""
    ranks = [islice(loader.windows(start, n, rank=rank, world=world), count) for rank in range(world)]
    for shares in zip(*ranks, strict=True):
        assert len({(n_targets, position) for _, n_targets, position in shares}) == 1, "all ranks agree"
        together = [shares[i % world][0][i // world] for i in range(n)]
        assert sum(batch.n_targets for batch in together) == shares[0][1]
        yield together, shares[0][2]


@settings(max_examples=200)
@given(windows(), st.integers(0, 3))
def test_processes_share_the_windows_of_a_single_one(made, epoch):
    _, loader, n, world, count = made
    start = Position(epoch)
    alone = islice(loader.windows(start, n), count)
    for (together, after), (batches, n_targets, position) in zip(
        of_all_ranks(loader, start, n, world, count), alone, strict=True
    ):
        assert_equal(together, batches)
        assert after == position and n_targets == sum(b.n_targets for b in batches)


@settings(max_examples=200)
@given(windows(), st.integers(0, 20), st.integers(1, 4))
def test_a_resume_with_another_number_of_processes_goes_on_in_the_same_order(made, stop, world_after):
    _, loader, n, world, count = made
    n *= world_after
    whole = [batches for batches, _, _ in islice(loader.windows(Position(), n), stop + count)]
    position = Position()
    before = list(of_all_ranks(loader, position, n, world, stop))
    position = before[-1][1] if before else position
    after = list(of_all_ranks(loader, position, n, world_after, count))
    for (seen, _), wanted in zip([*before, *after], whole, strict=True):
        assert_equal(seen, wanted)


@settings(max_examples=100)
@given(windows())
def test_every_token_is_a_target_exactly_once_an_epoch_among_all_processes(made):
    split, loader, n, world, _ = made
    stored = split.read(0, split.n_stored)
    seen = np.zeros(split.n_stored, dtype=int)
    epoch = loader.batches_in_epoch(0)
    together = chain.from_iterable(window for window, _ in of_all_ranks(loader, Position(), n, world, -(-epoch // n)))
    for batch in islice(together, epoch):  # the last window may reach into the next epoch
        np.add.at(seen, batch.targets[(batch.targets != IGNORE) & (batch.targets != SEPARATOR)].numpy(), 1)
    assert (seen[1:][stored[1:] != SEPARATOR] == 1).all()


@pytest.mark.parametrize(("n", "world"), [(3, 2), (1, 4)])
def test_windows_that_cannot_be_shared_out_are_refused(n, world):
    loader = Loader(split_of([20]), mode="stream", block_size=4, batch_size=2, seed=0)
    with pytest.raises(ConfigError, match=f"grad_accum {n} cannot be shared out evenly among {world} processes"):
        next(loader.windows(Position(), n, rank=0, world=world))


@pytest.mark.parametrize("mode", MODES)
def test_going_on_in_the_millionth_epoch_takes_no_longer_than_in_the_first(mode):
    loader = Loader(split_of([20, 7, 9]), mode=mode, block_size=4, batch_size=2, seed=0)
    batches, n_targets, position = next(loader.windows(Position(10**6, 1), 2))
    assert len(batches) == 2 and n_targets > 0 and position == Position(10**6, 3)
