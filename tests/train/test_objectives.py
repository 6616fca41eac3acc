"""What is learnt from a batch: pooled labels, hidden tokens, and how a run is told which."""

import shlex

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import zoo
from zoo.kernels.errors import CheckpointError, ConfigError, DataError
from zoo.train import cli
from zoo.train.config import train_config
from zoo.train.data import IGNORE, DataModule, create_source
from zoo.train.folder import default_name
from zoo.train.help import help_text
from zoo.train.metrics import TokenMetrics
from zoo.train.module import SequenceModule
from zoo.train.objectives import OBJECTIVES, Classify, Masked, Objective
from zoo.train.optim import OptimConfig
from zoo.train.run import _defaults, decide

from .conftest import TINY, same

LISTOPS = ("data=listops", "objective=classify")


def documents_of(segment_ids):
    """Row and slice of each document, found token by token."""
    for row, ids in enumerate(segment_ids.tolist()):
        start = 0
        for i in range(1, len(ids) + 1):
            if i == len(ids) or ids[i] != ids[start]:
                yield row, slice(start, i)
                start = i


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 1.0])
)
def test_each_position_gets_the_mean_of_its_document(batch, length, vocab, seed, share):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, vocab, generator=generator, requires_grad=True)
    segment_ids = (torch.rand(batch, length, generator=generator) < share).cumsum(1)
    pooled = Classify().read_out(logits, segment_ids)
    expected = torch.empty_like(logits)
    for row, where in documents_of(segment_ids):
        expected[row, where] = logits[row, where].mean(0)
    torch.testing.assert_close(pooled, expected)  # fp32 means of up to twelve numbers
    weights = torch.randn(pooled.shape, generator=generator)
    got, wanted = (torch.autograd.grad((out * weights).sum(), logits, retain_graph=True) for out in (pooled, expected))
    torch.testing.assert_close(got, wanted)


def test_without_segments_a_row_is_one_document():
    logits = torch.randn(2, 5, 3)
    whole = Classify().read_out(logits, torch.zeros(2, 5, dtype=torch.int64))
    torch.testing.assert_close(Classify().read_out(logits, None), whole)
    torch.testing.assert_close(whole[:, 0], logits.mean(1))


def test_the_mean_of_mixed_precision_is_taken_in_fp32():
    logits = torch.full((1, 3_000, 1), 1.0, dtype=torch.bfloat16)  # whose sum would stick at 256
    for segment_ids in (None, torch.zeros(1, 3_000, dtype=torch.int64)):
        assert Classify().read_out(logits, segment_ids)[0, 0].item() == 1.0


def test_pooled_logits_are_those_of_pooled_features():
    """Mean pooling before a linear classifier is what the loss sees."""
    model = zoo.create_model("transformer", vocab_size=9, d_model=16, n_layers=1, causal=False)
    module = SequenceModule(model, OptimConfig(lr=1e-3), max_steps=1, seed=0, objective=Classify())
    features = []
    model.norm.register_forward_hook(lambda norm, args, output: features.append(output))
    inputs, targets = torch.randint(9, (2, 6)), torch.full((2, 6), IGNORE)
    targets[0, 5], targets[1, 2] = 3, 7
    batch = {"inputs": inputs, "targets": targets, "slices": {}}
    loss = module.losses(batch, module(batch))["cross_entropy"]
    pooled = F.linear(features[0].mean(1), model.embedding.weight)
    torch.testing.assert_close(loss, F.cross_entropy(pooled, torch.tensor([3, 7])))


def test_padding_changes_no_loss():
    model = zoo.create_model("mamba", vocab_size=9, d_model=16, n_layers=2, causal=False)
    module = SequenceModule(model, OptimConfig(lr=1e-3), max_steps=1, seed=0, objective=Classify())
    inputs, targets = torch.randint(9, (2, 6)), torch.full((2, 6), IGNORE)
    targets[:, 5] = 3
    padded = {
        "inputs": F.pad(inputs, (4, 0), value=8),
        "targets": F.pad(targets, (4, 0), value=IGNORE),
        "segment_ids": F.pad(torch.ones_like(inputs), (4, 0)),
    }
    losses = [
        module.losses(batch, module(batch))["cross_entropy"]
        for batch in ({"inputs": inputs, "targets": targets}, padded)
    ]
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("segments", [None, [[0, 0, 1, 1]], [[0, 0, 0, 1]]])
def test_two_labels_in_a_document_are_one_clear_line(segments):
    batch = {"inputs": torch.zeros(1, 4, dtype=torch.int64), "targets": torch.tensor([[IGNORE, 1, 2, IGNORE]])}
    if segments is not None:
        batch["segment_ids"] = torch.tensor(segments)
    if segments == [[0, 0, 1, 1]]:
        assert Classify().prepare(batch, "train", 0) is batch
        return
    with pytest.raises(DataError, match=r"takes one label per document, but a document of these data has 2") as caught:
        Classify().prepare(batch, "train", 0)
    assert "\n" not in str(caught.value)


def text_batch(rows=64, length=128):
    """A batch like packed text: every token but the last of a document has a label."""
    inputs = torch.randint(200, (rows, length))
    segment_ids = (torch.arange(length) >= 100).long().expand(rows, length)
    targets = inputs.roll(-1, 1)
    targets[:, 99:] = IGNORE  # the second document is padding
    return {"inputs": inputs, "targets": targets, "segment_ids": segment_ids, "slices": {}, "digest": "ab"}


def test_shares_of_hidden_tokens():
    batch = text_batch(400)
    masked = Masked(0.15, 256, 0).prepare(batch, "train", 5)
    chosen = masked["targets"] != IGNORE
    assert not chosen[:, 100:].any()  # padding
    assert torch.equal(masked["targets"][chosen], batch["inputs"][chosen])
    assert torch.equal(masked["inputs"][~chosen], batch["inputs"][~chosen])
    # 40,000 tokens, 6,000 chosen: five deviations of the shares are 0.9 %, 2.6 % and 2 %
    assert chosen[:, :100].float().mean().item() == pytest.approx(0.15, abs=0.009)
    read = masked["inputs"][chosen]
    assert (read == 256).float().mean().item() == pytest.approx(0.8, abs=0.026)
    random = (read != 256) & (read != masked["targets"][chosen])
    assert random.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert read[random].min() < 20
    assert 235 < read[random].max() < 256  # the whole vocabulary, not only what the batch has
    assert chosen[:, 0].any()
    assert chosen[:, 99].any()  # also where the next token is another document's
    assert masked["segment_ids"] is batch["segment_ids"]


def test_what_is_hidden_depends_on_seed_batch_and_split_alone():
    batch = text_batch()

    def hidden(seed=1, index=2, split="train", rate=0.15):
        return Masked(rate, 256, seed).prepare(batch, split, index)

    def equal(a, b):
        return torch.equal(a["inputs"], b["inputs"]) and torch.equal(a["targets"], b["targets"])

    before = batch["inputs"].clone()
    first = hidden()
    torch.manual_seed(123)
    np.random.seed(5)  # noqa: NPY002
    state = torch.get_rng_state()
    assert equal(hidden(), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch["inputs"], before)
    for other in (hidden(seed=2), hidden(index=3), hidden(split="val"), hidden(split="test")):
        assert not equal(other, first)
    assert not equal(hidden(split="val"), hidden(split="test"))
    for split in ("val", "test"):
        assert equal(hidden(seed=2, split=split), hidden(split=split))
    assert (hidden(rate=1)["targets"][:, :100] != IGNORE).all()


def test_metrics_of_hidden_tokens_have_names_of_their_own():
    metric = TokenMetrics(perplexity=Masked.perplexity)
    metric.update(torch.zeros(1, 2, 4), torch.tensor([[1, IGNORE]]))
    result = metric.compute()
    assert result["masked_perplexity"] == pytest.approx(4)
    assert "perplexity" not in result


def test_objectives_by_name():
    assert {name: kind.causal for name, kind in OBJECTIVES.items()} == {
        "causal": True,
        "masked": False,
        "classify": False,
    }
    assert OBJECTIVES["causal"] is Objective


@pytest.mark.parametrize(
    ("words", "causal", "vocab_size", "mask_rate"),
    [
        ("", True, 17, None),
        ("objective=classify", False, 17, None),
        ("objective=classify arch.causal=true", True, 17, None),
        ("objective=masked", False, 18, 0.15),
        ("objective=masked mask_rate=0.4 arch.vocab_size=40", False, 40, 0.4),
    ],
)
def test_what_is_left_open_follows_the_objective(words, causal, vocab_size, mask_rate):
    config = train_config(["data=listops", *words.split()])
    assert ("causal" in config.model) == ("arch.causal" in words)
    config = decide(config, create_source(config.data))
    assert (config.model["causal"], config.model["vocab_size"], config.mask_rate) == (causal, vocab_size, mask_rate)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("", "mamba-listops"),
        ("objective=classify", "mamba-listops-classify"),
        ("objective=classify arch.causal=false", "mamba-listops-classify"),
        ("objective=classify arch.causal=true", "mamba-listops-classify-causalTrue"),
        ("objective=masked mask_rate=0.2 seed=1", "mamba-listops-masked-mask_rate0.2-s1"),
    ],
)
def test_a_run_is_named_by_its_objective(words, name):
    config = train_config(["arch=mamba", "data=listops", *words.split()])
    assert default_name(config.to_dict("listops"), _defaults(config, "listops")) == name


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ("objective=classfy", 2, "objective='classfy' is not valid: did you mean 'classify'?"),
        ("arch.causal=false", 2, "arch.causal=false sees the tokens that objective=causal asks it to predict: leave"),
        ("objective=masked arch.causal=true", 2, "arch.causal=true sees one side only of the tokens that"),
        ("mask_rate=0.3", 2, "mask_rate=0.3 means nothing to objective=causal: leave it out"),
        ("objective=masked mask_rate=0", 2, "mask_rate=0.0 is not valid: expected more than 0"),
        ("objective=masked mask_rate=2", 2, "mask_rate=2.0 is not valid: expected at most 1"),
        ("objective=masked arch.vocab_size=64", 2, "which has 65 token ids, the mask token included: raise it"),
        ("objective=classify", 2, "a document of these data has 4: take data such as listops"),
        ("arch.causal=perhaps", 2, "arch.causal=perhaps is not valid: expected true or false"),
    ],
)
def test_contradictions_are_one_line_and_leave_no_folder(words, status, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("ZOO_DEBUG", raising=False)
    monkeypatch.setattr("sys.argv", ["zoo.train", *TINY, "data.seq_len=32", "data.num_pairs=4", *shlex.split(words)])
    assert cli.main() == status
    err = capsys.readouterr().err
    assert line in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def classified(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs"), "arch=mamba", *LISTOPS, "trainer.max_steps=3")


def test_a_classifying_run_says_so(classified):
    summary = classified.summary
    assert summary["objective"] == summary["config"]["objective"] == "classify"
    assert summary["config"]["arch"]["causal"] is False
    assert classified.folder.name.startswith("mamba-listops-classify")
    assert summary["levels"].keys() == {"majority", "root"}
    assert any(key.startswith("acc/depth=") for key in summary["metrics"]["test"])


def test_test_metrics_are_those_of_the_saved_model(classified):
    model = zoo.load_pretrained(classified.folder)
    data = DataModule(train_config([*LISTOPS, *TINY]).data, 0)
    right = labels = 0
    for batch in data.test_dataloader():
        with torch.no_grad():
            logits = model(batch["inputs"], segment_ids=batch["segment_ids"]).logits
        for row, where in documents_of(batch["segment_ids"]):
            labelled = batch["targets"][row, where] != IGNORE
            if labelled.any():
                right += int(logits[row, where].mean(0).argmax() == batch["targets"][row, where][labelled])
                labels += 1
    assert labels == 32
    assert classified.summary["metrics"]["test"]["acc"] == pytest.approx(right / labels)


def test_objectives_and_architectures_share_the_batches(classified, train, tmp_path):
    causal = train(tmp_path, "arch=mamba", "data=listops", "trainer.max_steps=3")
    masked = train(tmp_path, "arch=transformer", "data=listops", "objective=masked", "trainer.max_steps=3")
    transformer = train(tmp_path, "arch=transformer", *LISTOPS, "trainer.max_steps=3")
    for other in (causal, masked, transformer):
        assert other.summary["batch_hash"] == classified.summary["batch_hash"]
    assert causal.summary["config"]["arch"]["causal"] is True
    assert masked.summary["levels"] == {}
    assert masked.summary["config"]["mask_rate"] == 0.15


def test_every_architecture_is_given_the_same_hidden_tokens(train, tmp_path, monkeypatch):
    seen = {"mamba": [], "transformer": []}
    for arch, batches in seen.items():
        with monkeypatch.context() as patch:

            def prepare(self, batch, split, index, _prepare=Masked.prepare, _batches=batches):
                _batches.append((split, index, out := _prepare(self, batch, split, index)))
                return out

            patch.setattr(Masked, "prepare", prepare)
            train(tmp_path, f"arch={arch}", "objective=masked", "trainer.max_steps=2", "trainer.val_every=1")
    assert {split for split, _, _ in seen["mamba"]} == {"train", "val", "test"}
    assert len(seen["mamba"]) == len(seen["transformer"])
    for (split, index, one), (other_split, other_index, other) in zip(*seen.values(), strict=True):
        assert (split, index) == (other_split, other_index)
        assert torch.equal(one["inputs"], other["inputs"])
        assert torch.equal(one["targets"], other["targets"])


def test_masked_text_is_not_scored_in_bits_per_byte_and_writes_nothing(train, tmp_path, monkeypatch, capsys):
    from zoo import cli as zoo_cli

    (tmp_path / "text").write_text("".join(f"line {number} of a small text\n" for number in range(2_000)))
    words = ("data=text", f"data.path={tmp_path / 'text'}", "data.seq_len=64", "objective=masked")
    run = train(tmp_path / "runs", "arch=transformer", *words, "trainer.max_steps=2", "trainer.eval_batches=1")
    test = run.summary["metrics"]["test"]
    assert {"loss", "acc", "masked_perplexity"} <= test.keys()
    assert not {"bits_per_byte", "perplexity"} & test.keys()
    assert run.summary["config"]["arch"]["vocab_size"] == 257
    monkeypatch.setattr("sys.argv", ["zoo", "generate", f"model={run.folder}", "prompt=def "])
    with pytest.raises(SystemExit) as exit:
        zoo_cli.main()
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert "this transformer has causal=false and so no state" in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_a_resumed_run_hides_the_same_tokens(train, tmp_path):
    words = ("arch=mamba", "objective=masked", "trainer.max_steps=4", "trainer.val_every=2")
    whole = train(tmp_path, *words, "name=whole")
    again = train(tmp_path, *words, "name=again")
    for file in (again.folder / "checkpoints").glob("*4.ckpt"):
        file.unlink()
    (again.folder / "summary.json").unlink()
    resumed = train(tmp_path, *words, "name=again", "resume=true")
    assert same(resumed.weights(4), whole.weights(4))


def test_another_objective_is_another_run(classified, train):
    with pytest.raises(CheckpointError, match=r"objective: 'classify' there, 'causal' now"):
        train(
            classified.folder.parent,
            "arch=mamba",
            "data=listops",
            "trainer.max_steps=3",
            f"name={classified.folder.name}",
            "resume=true",
        )


def test_the_help_names_the_objectives():
    text = " ".join(help_text([]).split())
    for name in OBJECTIVES:
        assert f"{name}: " in text
    assert "mask_rate" in text


def test_settings_are_checked_as_the_objective_decides(monkeypatch):
    """A setting that only works one way is checked that way before anything runs."""
    from zoo.registry import architecture

    seen = []
    config = architecture("mamba").config
    monkeypatch.setattr(
        config, "__post_init__", lambda self, _f=config.__post_init__: (seen.append(self.causal), _f(self))[1]
    )
    train_config(["objective=classify"])
    assert seen[-1] is False
    with pytest.raises(ConfigError):
        train_config(["objective=nothing"])
