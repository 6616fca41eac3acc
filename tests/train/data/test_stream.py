"""The batch stream: a function of config, seed and index; resumable; shared evenly by devices; hashed."""

import itertools
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

import zoo
from zoo.train.data import BatchHash, BatchStream, DataModule, EvalBatches, MQARConfig
from zoo.train.data.stream import _order, digest

from .conftest import PROSE

SMALL = {"num_examples": 300, "validation_examples": 21, "test_examples": 5}


def tables(*sizes: int) -> list[datasets.Dataset]:
    """Tables of two tokens a row, all tokens different."""
    numbers = itertools.count()
    return [
        datasets.Dataset.from_dict(
            {
                "inputs": [[next(numbers), 0] for _ in range(size)],
                "targets": [[-100, 7]] * size,
                "slice_part": [i] * size,
            },
            features=datasets.Features(
                {
                    "inputs": datasets.Sequence(datasets.Value("int32"), length=2),
                    "targets": datasets.Sequence(datasets.Value("int16"), length=2),
                    "slice_part": datasets.Value("int32"),
                }
            ),
        ).with_format("arrow")
        for i, size in enumerate(sizes)
    ]


def names(batch) -> list[int]:
    return batch["inputs"][:, 0].tolist()


def test_a_batch_holds_int64_tensors():
    batch = next(iter(DataModule(MQARConfig(seq_len=32, **SMALL), seed=0).train_dataloader()))
    assert batch["inputs"].shape == batch["targets"].shape == (64, 32)
    assert batch["slices"].keys() == {"seq_len", "num_pairs"}
    assert batch["slices"]["num_pairs"].shape == (64,)
    tensors = [batch["inputs"], batch["targets"], *batch["slices"].values()]
    assert all(tensor.dtype == torch.int64 for tensor in tensors)
    batch["inputs"][0] = 1  # writable: no memory-mapped page behind it


def test_without_a_seed_rows_come_in_order_and_the_last_batch_is_filled_up():
    stream = iter(BatchStream(tables(5, 4), batch_size=2, seed=None))
    assert [names(next(stream)) for _ in range(7)] == [[0, 1], [2, 3], [4, 0], [5, 6], [7, 8], [0, 1], [2, 3]]


def test_more_rows_in_a_batch_than_in_the_table():
    assert names(BatchStream(tables(3), batch_size=8, seed=None).batch(0)) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_with_a_seed_an_epoch_has_every_row_once_in_batches_of_one_table():
    stream = BatchStream(tables(40, 20), batch_size=4, seed=3)
    epochs = [[stream.batch(15 * epoch + i) for i in range(15)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(name for batch in epoch for name in names(batch)) == list(range(60))
        assert all(len(set(batch["slices"]["part"].tolist())) == 1 for batch in epoch)
        assert [batch["slices"]["part"][0].item() for batch in epoch] != sorted([0] * 10 + [1] * 5)
    first, second = ({frozenset(names(batch)) for batch in epoch} for epoch in epochs)
    assert first != second
    assert [batch["slices"]["part"][0].item() for batch in epochs[0]] != [
        batch["slices"]["part"][0].item() for batch in epochs[1]
    ]
    other = BatchStream(tables(40, 20), batch_size=4, seed=4)
    assert [names(other.batch(i)) for i in range(15)] != [names(batch) for batch in epochs[0]]


def test_the_order_is_pinned():
    # Results name their batches by hash: an order that changes makes old and new runs incomparable.
    assert _order(123, 1, 2, 10).tolist() == [1, 3, 0, 9, 2, 8, 4, 6, 7, 5]
    assert _order(None, 1, 2, 10) is None


@pytest.mark.parametrize("start", [1, 4, 5, 17])
def test_a_resumed_stream_goes_on_exactly(start):
    data = DataModule(MQARConfig(**SMALL), seed=7)
    undisturbed = list(itertools.islice(data.train_dataloader(), 20))
    data.start_batch = start
    for expected, batch in zip(undisturbed[start:], data.train_dataloader(), strict=False):
        assert torch.equal(batch["inputs"], expected["inputs"])
        assert torch.equal(batch["targets"], expected["targets"])
        assert batch["digest"] == expected["digest"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_change_nothing():
    alone = itertools.islice(DataModule(MQARConfig(**SMALL), seed=7).train_dataloader(), 7)
    state = torch.get_rng_state()
    data = DataModule(MQARConfig(**SMALL, num_workers=2), seed=7)
    data.start_batch = 2
    helped = list(itertools.islice(data.train_dataloader(), 5))
    assert [batch["digest"] for batch in helped] == [batch["digest"] for batch in alone][2:]
    assert torch.equal(torch.get_rng_state(), state)


def test_neither_the_model_nor_torchs_random_state_matters():
    def hashed() -> str:
        running = BatchHash()
        for batch in itertools.islice(DataModule(MQARConfig(**SMALL), seed=0).train_dataloader(), 8):
            running.update(batch)
        return running.state

    before = hashed()
    zoo.create_model("transformer", vocab_size=64, d_model=16, n_layers=1, n_heads=2)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    state = torch.get_rng_state()
    assert hashed() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_another_process_reads_the_same_bytes_from_the_same_cache(cache: Path, tmp_path: Path, tokenizer_file: Path):
    (tmp_path / "book.txt").write_text(PROSE * 60, encoding="utf-8")
    program = f"""
import itertools, torch
from zoo.train.data import BatchHash, DataModule, MQARConfig, TextConfig
torch.nn.Linear(50, 50)
mqar = MQARConfig(num_examples=300, random_fillers=True)
text = TextConfig(path={str(tmp_path)!r}, tokenizer={str(tokenizer_file)!r}, seq_len=16)
running = BatchHash()
for config in (mqar, text):
    for batch in itertools.islice(DataModule(config, seed=11).train_dataloader(), 12):
        running.update(batch)
state = running.state
"""
    here: dict[str, str] = {}
    exec(program, here)
    made = {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")}
    arguments = [sys.executable, "-c", program + "print(state)"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(zoo.__file__).parents[1], check=True)
    assert done.stdout.strip() == here["state"]
    assert done.stderr == ""
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")} == made


@pytest.mark.parametrize("world_size", [2, 4])
def test_devices_share_each_training_batch(world_size):
    whole = BatchStream(tables(10), batch_size=4, seed=1)
    shares = [BatchStream(tables(10), batch_size=4, seed=1, rank=r, world_size=world_size) for r in range(world_size)]
    for index in range(6):
        expected = whole.batch(index)
        parts = [share.batch(index) for share in shares]
        assert {len(names(part)) for part in parts} == {4 // world_size}
        assert sorted(name for part in parts for name in names(part)) == sorted(names(expected))
        assert {part["digest"] for part in parts} == {expected["digest"]}


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_devices_share_evaluation_evenly_and_score_each_row_once(world_size):
    shares = [
        list(EvalBatches(tables(7, 1), batch_size=3, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert {len(share) for share in shares} == {len(EvalBatches(tables(7, 1), batch_size=3))} == {4}
    for batches in zip(*shares, strict=True):
        assert len({len(batch["inputs"]) for batch in batches}) == 1
    scored = [
        name
        for share in shares
        for batch in share
        for name, row in zip(names(batch), batch["targets"], strict=True)
        if (row != -100).any()
    ]
    assert sorted(scored) == list(range(8))


def test_a_batch_that_devices_cannot_share_is_refused():
    data = DataModule(MQARConfig(**SMALL), seed=0)
    data.trainer = type("Trainer", (), {"global_rank": 0, "world_size": 3})()
    with pytest.raises(zoo.kernels.errors.ConfigError, match=r"data\.batch_size=64 cannot be shared by 3 devices"):
        data.train_dataloader()


def test_the_hash_knows_content_and_order_and_can_be_resumed():
    stream = BatchStream(tables(40), batch_size=4, seed=3)
    batches = [stream.batch(i) for i in range(6)]

    def hashed(batches, state="0" * 64) -> str:
        running = BatchHash(state)
        for batch in batches:
            running.update(batch)
        return running.state

    assert hashed(batches) == hashed(batches[2:], state=hashed(batches[:2]))
    assert len({hashed(batches), hashed(batches[::-1]), hashed(batches[:5]), hashed([]), hashed(batches[1:])}) == 5
    # A batch without its digest is hashed itself, as one moved to a device would be.
    assert hashed({k: v for k, v in batch.items() if k != "digest"} for batch in batches) == hashed(batches)


def test_a_digest_covers_every_sequence_of_a_batch():
    batch = {name: torch.arange(6).reshape(2, 3) for name in ("inputs", "targets", "segment_ids")}
    found = {digest(batch)}
    for name in batch:
        changed = batch | {name: batch[name].clone()}
        changed[name][1, 2] += 1
        found.add(digest(changed))
    found.add(digest({name: tensor.reshape(3, 2) for name, tensor in batch.items()}))
    found.add(digest({name: tensor for name, tensor in batch.items() if name != "segment_ids"}))
    assert len(found) == 6
    strided = {name: tensor.repeat_interleave(2, 1)[:, ::2] for name, tensor in batch.items()}
    assert digest(strided) == digest(batch)
