"""Training on running text: batches whose rows go on, and a state that is carried along."""

import itertools
import signal

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import zoo
from zoo.kernels.errors import ConfigError
from zoo.train.config import train_config
from zoo.train.data import DataModule
from zoo.train.data.packing import pack
from zoo.train.data.running import RunningEval, RunningStream, RunningText
from zoo.train.errors import Interrupted
from zoo.train.module import SequenceModule
from zoo.train.optim import OptimConfig
from zoo.train.run import decide

from .conftest import TINY
from .test_resume import assert_equal_runs

DOCUMENTS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def windows_of(lengths: list[int], seq_len: int) -> datasets.Dataset:
    """The packed windows of documents whose tokens are 1, 2, 3, ... over all of them."""
    ends = np.cumsum(lengths) + 1
    documents = [(np.arange(end - size, end), np.ones(size)) for size, end in zip(lengths, ends, strict=True)]
    features = datasets.Features(
        {name: datasets.Sequence(datasets.Value("int64"), length=seq_len) for name in ("inputs", "targets")}
        | {"segment_ids": datasets.Sequence(datasets.Value("int64"), length=seq_len)}
        | {"document": datasets.Value("int64"), "target_bytes": datasets.Value("int64")}
    )
    rows = list(pack(documents, seq_len))
    return datasets.Dataset.from_dict({k: [r[k] for r in rows] for k in features}, features).with_format("arrow")


def assert_goes_on_exactly_where_the_text_does(rows: list[dict], row: int) -> None:
    """A row keeps its id from token to token just where a token predicts the next one, and in the filling."""
    tokens, targets, ids = (torch.cat([batch[n][row] for batch in rows]) for n in ("inputs", "targets", "segment_ids"))
    goes_on, predicted = ids[1:] == ids[:-1], tokens[1:] == targets[:-1]
    filling = (tokens == 0) & (targets < 0)
    assert torch.equal(goes_on & ~filling[1:], predicted)


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS, st.sampled_from([(2, 1), (4, 2), (6, 2), (5, 5)]), st.integers(1, 5), st.integers(1, 30))
def test_a_pass_reads_every_kept_target_once_and_rows_go_on(lengths, cut, rows, wanted):
    windows = windows_of(lengths, cut[0])
    text = RunningText(windows, rows, cut[1], wanted)
    batches = list(RunningEval(text))
    assert len(text.windows) == min(wanted, len(windows))
    assert len({len(batch["inputs"]) for batch in batches}) == 1, "a state has as many rows in every batch"
    assert len(batches) == len(RunningEval(text))
    read = sorted(t for batch in batches for t in batch["targets"].flatten().tolist() if t >= 0)
    kept = text.windows[:]["targets"].combine_chunks().flatten().to_pylist()
    assert read == sorted(t for t in kept if t >= 0)
    if wanted >= len(windows):
        firsts = {1, *(np.cumsum(lengths) + 1).tolist()}
        assert read == [t for t in range(1, sum(lengths) + 1) if t not in firsts]
        for row in range(len(batches[0]["inputs"])):
            own = [b for b in batches if (b["targets"][row] >= 0).any()]
            if len(own) == len(batches):
                assert_goes_on_exactly_where_the_text_does(batches, row)


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS, st.sampled_from([(2, 1), (4, 2), (5, 5)]), st.integers(1, 5), st.integers(1, 30), st.integers(0, 5))
def test_training_rows_go_on_for_ever_and_read_everything_equally_often(lengths, cut, rows, wanted, seed):
    text = RunningText(windows_of(lengths, cut[0]), rows, cut[1], wanted)
    stream = RunningStream(text, seed=seed)
    batches = [stream.batch(i) for i in range(2 * text.n_segments)]  # two rounds
    everything = sorted(text.windows[:]["inputs"].combine_chunks().flatten().to_pylist() * 2)
    for row in range(rows):
        assert sorted(torch.cat([batch["inputs"][row] for batch in batches]).tolist()) == everything
        assert_goes_on_exactly_where_the_text_does(batches, row)


def test_few_kept_windows_come_from_all_over_the_split():
    kept = RunningText(windows_of([400], 4), 4, 4, 20).windows[:]["inputs"].combine_chunks().flatten().to_numpy()[::4]
    assert kept.tolist() == [1 + start + 4 * i for start in (0, 100, 200, 300) for i in range(5)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words for a run on 150 small files, and two large ones."""
    folder, draw = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for number in range(152):
        size = 700 if number < 2 else int(draw.integers(5, 90))
        (folder / f"{number}.txt").write_bytes(draw.integers(97, 110, size).astype(np.uint8).tobytes())
    return (
        "data=text",
        f"data.path={folder}",
        "data.seq_len=32",
        "data.num_examples=null",
        "data.validation_share=0.2",
        "data.test_share=0.2",
        "data.eval_batch_size=4",
        "trainer.segment_length=16",
    )


def data_of(words, *more, seed=0) -> DataModule:
    config = train_config([*TINY, *words, *more])
    return DataModule(config.data, seed, config.trainer.segment_length)


def test_a_batch_depends_on_its_number_and_the_seed_alone(text):
    batches = list(itertools.islice(data_of(text).train_dataloader(), 8))
    later = data_of(text, "data.num_workers=2")
    later.start_batch = 3
    for batch, again in zip(batches[3:], later.train_dataloader(), strict=False):
        assert batch["digest"] == again["digest"]
    others = {next(iter(data_of(text, seed=seed).train_dataloader()))["digest"] for seed in range(4)}
    assert len(others) == 4
    unshuffled = next(iter(data_of(text, "data.shuffle=false", seed=5).train_dataloader()))
    assert unshuffled["segment_ids"][0, 0] == 0


def make(name: str) -> zoo.Model:
    """A small model whose outputs depend on what is remembered."""
    torch.manual_seed(0)
    model = zoo.create_model(name, vocab_size=11, d_model=24, n_layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and not parameter.any():
                parameter.normal_(std=0.2)
    return model


def a_row_of_documents() -> dict[str, Tensor]:
    """48 tokens in each of two rows: documents that end inside a segment of 12, at its end, and go on."""
    lengths = [[5, 19, 20, 4], [30, 6, 12]]
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths], batch_first=True
    )
    return {"inputs": torch.randint(11, (2, 48)), "targets": torch.randint(11, (2, 48)), "segment_ids": ids}


def segments_of(batch: dict[str, Tensor], length: int = 12) -> list[dict[str, Tensor]]:
    return [{k: v[:, at : at + length] for k, v in batch.items()} for at in range(0, 48, length)]


def module_of(model: zoo.Model) -> SequenceModule:
    return SequenceModule(model, OptimConfig(lr=1e-3), max_steps=10, seed=0, carries=True)


def gradients(model: zoo.Model) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", zoo.list_models())
def test_with_gradients_through_the_state_segments_equal_the_whole(name):
    model, batch = make(name), a_row_of_documents()
    logits = model(batch["inputs"], segment_ids=batch["segment_ids"]).logits
    F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).backward()
    expected = gradients(model)
    loss, state, parts = torch.zeros(()), model.init_state(2), []
    for segment in segments_of(batch):
        out = model(segment["inputs"], state=model.trim_state(state), segment_ids=segment["segment_ids"])
        loss = loss + F.cross_entropy(out.logits.flatten(0, 1), segment["targets"].flatten()) / 4
        state = out.state
        parts.append(out.logits.detach())
    loss.backward()
    torch.testing.assert_close(torch.cat(parts, dim=1), logits.detach(), rtol=2e-4, atol=2e-5)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=2e-4, atol=2e-4 * gradient.abs().max().item())


def cut_off(state):
    if isinstance(state, Tensor):
        return state.detach()
    parts = [cut_off(part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


@pytest.mark.parametrize("name", zoo.list_models())
def test_training_steps_equal_a_loop_by_hand(name):
    model, batch = make(name), a_row_of_documents()
    module, state = module_of(model), model.init_state(2)
    for number, segment in enumerate(segments_of(batch)):
        out = model(segment["inputs"], state=state, segment_ids=segment["segment_ids"])
        state = cut_off(out.state)
        by_hand = F.cross_entropy(out.logits.flatten(0, 1), segment["targets"].flatten()) + sum(out.losses.values())
        by_hand.backward()
        expected = gradients(model)
        loss = module.training_step(segment, number)
        loss.backward()
        torch.testing.assert_close(loss, by_hand)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)
    alone = module_of(model).training_step(segment, 0)
    assert abs(alone.item() - by_hand.item()) > 1e-5, "what was read before should matter"


def test_keys_that_no_document_sees_are_dropped():
    model, tokens = make("transformer"), torch.randint(11, (2, 200))
    ids = torch.stack((torch.arange(200) // 20, torch.arange(200) // 35))
    module, held = module_of(model), []
    for at in range(0, 200, 10):
        segment = {"inputs": tokens[:, at : at + 10], "targets": tokens[:, at : at + 10]}
        segment["segment_ids"] = ids[:, at : at + 10]
        module.training_step(segment, at)
        held.append(module._states["train"].layers[0][0].k.shape[1])
    assert max(held) <= 35 + 10
    assert min(held[4:]) <= 20 + 10


def test_a_run_cut_short_ends_bit_identical(train, text, tmp_path, monkeypatch):
    """A hybrid, whose state is made of a recurrence and of a cache that grows."""
    more = ("arch.pattern=[mamba,transformer]", "trainer.max_steps=8", "trainer.val_every=3")
    words = ("arch=hybrid", *text, *more, "arch.n_layers=2", "trainer.accumulate=2")
    undisturbed = train(tmp_path, *words, "name=undisturbed")
    step, calls = SequenceModule.training_step, itertools.count(1)

    def interrupted(self, *args):
        if next(calls) == 9:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SequenceModule, "training_step", interrupted)
        with pytest.raises(Interrupted, match=r"^interrupted after step 5"):
            train(tmp_path, *words, "name=x")
    assert_equal_runs(train(tmp_path, *words, "name=x", "resume=true"), undisturbed, 8)


def test_test_metrics_are_those_of_a_text_read_on(train, text, tmp_path):
    run = train(tmp_path, "arch=mamba", *text, "trainer.max_steps=4", "optim.lr=0.05")
    assert run.summary["segment_length"] == 16
    assert run.folder.name == "mamba-text-segments16"
    model, nats, labels = zoo.load_pretrained(run.folder), 0.0, 0
    for row in range(4):
        state = model.init_state(1)
        for batch in data_of(text).test_dataloader():
            segment = {k: v[row : row + 1] for k, v in batch.items() if k != "slices"}
            with torch.no_grad():
                out = model(segment["inputs"], state=state, segment_ids=segment["segment_ids"])
            nats += F.cross_entropy(out.logits[0], segment["targets"][0], reduction="sum").item()
            labels += int((segment["targets"] >= 0).sum())
            state = out.state
    assert run.summary["metrics"]["test"]["loss"] == pytest.approx(nats / labels, rel=1e-5)


def test_each_pass_of_a_validation_begins_anew():
    module, batch = module_of(make("mamba")), a_row_of_documents() | {"segment_ids": torch.zeros(2, 48).long()}
    passes = []
    for _ in range(2):
        for number, segment in enumerate(segments_of(batch)):
            module.validation_step(segment, number)
        module.on_validation_epoch_end()
        passes.append(module.results["val"])
    assert passes[0] == passes[1]


@pytest.mark.parametrize("name", zoo.list_models())
def test_mixed_precision_carries_a_state_too(name):
    module = module_of(make(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [module.training_step(segment, i) for i, segment in enumerate(segments_of(a_row_of_documents()))]
    sum(losses).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    if name == "transformer":
        assert module._states["train"].layers[0][0].k.dtype == torch.bfloat16, "a cache of activations is one of theirs"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data=pystdlib", "objective=masked"], "only models that read one way have: leave it or objective=masked out"),
        (["data=listops", "objective=classify"], "leave it or objective=classify out"),
        (["data=mqar"], "the rows of data=mqar are no running text: leave it out, or take data such as pystdlib"),
        (["data=pystdlib", "data.seq_len=40"], r"does not divide data.seq_len=40, .*: set data.seq_len=16 as well"),
        (
            ["data=pystdlib", "arch=hybrid", 'arch.pattern=["mamba","landmark"]'],
            "cannot carry the blocks of landmark beside other mixers: set data.batch_size=1 and data.eval_batch_size=1",
        ),
    ],
)
def test_what_cannot_be_carried_is_one_line(words, told):
    config = train_config([*words, "trainer.segment_length=16"])
    with pytest.raises(ConfigError, match=rf"^trainer.segment_length=16 .*{told}$"):
        decide(config, DataModule(config.data, 0, 16).source)
