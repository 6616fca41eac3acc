"""A run from settings to summary, on tiny models."""

import csv
import math
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.kernels.errors import CheckpointError, ConfigError, DataError
from zoo.train.callbacks import WARMUP_STEPS
from zoo.train.config import train_config
from zoo.train.data import BatchHash, DataModule, create_source
from zoo.train.errors import NonFiniteError
from zoo.train.module import SequenceModule
from zoo.train.optim import learning_rate_factor
from zoo.train.run import decide

from .conftest import MQAR, TINY, same

# fmt: off
DESIGN_KEYS = {
    "arch", "data", "seed", "params", "steps", "tokens", "wall_seconds", "tokens_per_second", "peak_memory_bytes",
    "device", "dtype", "backends", "versions", "git_commit", "batch_hash", "metrics", "config", "status", "command",
}
# fmt: on


@pytest.fixture(scope="module")
def mamba(train, tmp_path_factory):
    """Twelve steps of mamba, three validations."""
    return train(tmp_path_factory.mktemp("runs"), "arch=mamba", "trainer.max_steps=12", "trainer.val_every=4")


def rows(run, column: str) -> dict[int, float]:
    with (run.folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row[column]}


def test_the_folder_holds_everything(mamba):
    names = {path.name for path in mamba.folder.iterdir()}
    assert {"config.yaml", "metrics.csv", "summary.json", "checkpoints", "model", "tensorboard"} == names
    assert list(mamba.folder.glob("tensorboard/events.*"))
    assert not list(mamba.folder.rglob("*.part"))


def test_the_summary_is_complete(mamba):
    summary = mamba.summary
    assert summary.keys() >= DESIGN_KEYS
    assert (summary["arch"], summary["data"], summary["seed"], summary["steps"]) == ("mamba", "mqar", 0, 12)
    assert summary["tokens"] == 12 * 8 * 32
    assert summary["status"] == "finished"
    assert summary["metrics"].keys() == {"train", "val", "test"}
    assert "acc/num_pairs=4" in summary["metrics"]["test"]
    assert summary["backends"]["selective_scan"]
    assert summary["peak_memory_bytes"] > 50 * 2**20
    assert summary["tokens_per_second"] > 0
    assert 0 < summary["train_seconds"] < summary["wall_seconds"]
    assert summary["config"]["arch"]["vocab_size"] == 64
    assert summary["final_loss"] == rows(mamba, "train/loss")[12]


def test_test_metrics_are_those_of_the_saved_model(mamba):
    model = zoo.load_pretrained(mamba.folder)
    data = DataModule(train_config(["arch=mamba", *TINY, *MQAR]).data, 0)
    right = labels = 0
    loss = 0.0
    for batch in data.test_dataloader():
        with torch.no_grad():
            logits = model(batch["inputs"]).logits
        labelled = batch["targets"] != -100
        right += int((logits.argmax(-1) == batch["targets"])[labelled].sum())
        labels += int(labelled.sum())
        loss += F.cross_entropy(logits[labelled], batch["targets"][labelled], reduction="sum").item()
    assert labels == 32 * 4
    assert mamba.summary["metrics"]["test"]["acc"] == pytest.approx(right / labels)
    assert mamba.summary["metrics"]["test"]["loss"] == pytest.approx(loss / labels, rel=1e-5)


def test_the_rate_follows_the_schedule_step_by_step(mamba):
    optim = train_config(["arch=mamba", *TINY, *MQAR]).optim
    rates = rows(mamba, "train/lr")
    peak = mamba.summary["config"]["optim"]["lr"]
    assert sorted(rates) == list(range(1, 13))
    for step, rate in rates.items():
        assert rate == pytest.approx(peak * learning_rate_factor(step - 1, optim, 12))


def test_the_hash_is_that_of_the_batches_the_data_give(mamba):
    data = DataModule(train_config(["arch=mamba", *TINY, *MQAR]).data, 0)
    chained = BatchHash()
    for _, batch in zip(range(12), data.train_dataloader(), strict=False):
        chained.update(batch)
    assert mamba.summary["batch_hash"] == chained.state
    assert sorted(map(int, mamba.summary["batch_hash_after"])) == [1, 2, 4, 8]


def test_one_seed_gives_one_run_and_another_seed_another(mamba, train, tmp_path):
    words = ("arch=mamba", "trainer.max_steps=12", "trainer.val_every=4")
    again, other = train(tmp_path, *words), train(tmp_path, *words, "seed=1")
    for key in ("final_loss", "batch_hash", "metrics"):
        assert again.summary[key] == mamba.summary[key]
        assert other.summary[key] != mamba.summary[key]
    assert same(again.weights(12), mamba.weights(12))


def test_architectures_see_the_same_batches_and_validation_changes_nothing(mamba, train, tmp_path):
    transformer = train(tmp_path, "arch=transformer", "trainer.max_steps=12", "trainer.val_every=12")
    assert transformer.summary["batch_hash"] == mamba.summary["batch_hash"]
    rarely = train(tmp_path, "arch=mamba", "trainer.max_steps=12", "trainer.val_every=12")
    assert same(rarely.weights(12), mamba.weights(12))


def test_dropout_depends_on_seed_and_step_alone(toy, train, tmp_path):
    often = train(tmp_path, "arch=toy", "trainer.max_steps=6", "trainer.val_every=1")
    rarely = train(tmp_path, "arch=toy", "trainer.max_steps=6", "trainer.val_every=6")
    assert same(often.weights(6), rarely.weights(6))


def test_the_speed_is_that_of_training_alone(toy, train, tmp_path, monkeypatch):
    def finish(self, _finish=SequenceModule.on_validation_epoch_end):
        _finish(self)
        time.sleep(0.2)

    monkeypatch.setattr(SequenceModule, "on_validation_epoch_end", finish)
    toy.at_step = lambda mixer, call: time.sleep(1 if call <= WARMUP_STEPS else 0.01)
    summary = train(tmp_path, "arch=toy", "trainer.max_steps=25", "trainer.val_every=5").summary
    steps = 25 - WARMUP_STEPS
    assert 0.01 * steps < summary["train_seconds"] < WARMUP_STEPS / 2  # beside other work it is slow
    assert summary["tokens_per_second"] == pytest.approx(steps * 8 * 32 / summary["train_seconds"])
    assert summary["wall_seconds"] > WARMUP_STEPS + 5 * 0.2


def test_checkpoints_kept_are_the_newest_and_the_best(mamba):
    names = sorted(path.name for path in (mamba.folder / "checkpoints").iterdir())
    wanted = {8, 12, mamba.summary["best_step"]}
    assert names == [f"step-{step:09d}.ckpt" for step in sorted(wanted)]


def test_the_best_checkpoint_outlives_newer_ones_and_is_what_is_tested(toy, train, tmp_path, monkeypatch):
    def finish(self, _finish=SequenceModule.on_validation_epoch_end):
        _finish(self)
        self.results["val"]["loss"] = float(abs(self.global_step - 4))

    monkeypatch.setattr(SequenceModule, "on_validation_epoch_end", finish)
    run = train(tmp_path, "arch=toy", "trainer.max_steps=12", "trainer.val_every=2", "trainer.keep_checkpoints=1")
    assert run.summary["best_step"] == 4
    assert run.summary["metrics"]["val"]["loss"] == 0
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["step-000000004.ckpt", "step-000000012.ckpt"]
    saved = zoo.load_pretrained(run.folder).state_dict()
    assert same({f"model.{name}": tensor for name, tensor in saved.items()}, run.weights(4))
    assert not same(run.weights(4), run.weights(12))


def test_a_run_ends_with_a_validation_and_checkpoint_of_its_last_step(toy, train, tmp_path):
    run = train(tmp_path, "arch=toy", "trainer.max_steps=5", "trainer.val_every=3")
    assert sorted(rows(run, "val/loss")) == [3, 5]
    assert (run.folder / "checkpoints" / "step-000000005.ckpt").exists()


def test_accumulation_takes_several_batches_per_step(toy, train, tmp_path):
    words = ("arch=toy", "arch.dropout=0", "data.shuffle=false", "trainer.max_steps=4", "trainer.val_every=2")
    halves = train(tmp_path, *words, "data.batch_size=4", "trainer.accumulate=2")
    wholes = train(tmp_path, *words, "data.batch_size=8")
    assert halves.summary["steps"] == wholes.summary["steps"] == 4
    assert halves.summary["tokens"] == wholes.summary["tokens"] == 4 * 8 * 32
    assert rows(halves, "train/lr") == rows(wholes, "train/lr")
    assert rows(halves, "train/loss") == pytest.approx(rows(wholes, "train/loss"), rel=1e-4)
    assert sorted(rows(halves, "val/loss")) == [2, 4]


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_mixed_precision_keeps_fp32_weights(precision, train, tmp_path):
    seen = []
    words = ["arch=mamba", f"trainer.precision={precision}", "trainer.max_steps=3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            zoo.Model, "forward", lambda self, *a, _f=zoo.Model.forward, **k: seen.append(o := _f(self, *a, **k)) or o
        )
        run = train(tmp_path, *words)
    assert {o.logits.dtype for o in seen} == {torch.bfloat16 if precision == "bf16-mixed" else torch.float16}
    assert {t.dtype for t in run.weights(3).values()} == {torch.float32}
    assert run.summary["dtype"] == precision
    norms = rows(train(tmp_path, "arch=mamba", "trainer.max_steps=3"), "train/grad_norm")
    # bf16 has 8 bits of precision; a norm of gradients still scaled would be off by a factor of thousands.
    assert rows(run, "train/grad_norm") == pytest.approx(norms, rel=0.1)


def test_compile_changes_neither_keys_nor_result(toy, train, tmp_path, monkeypatch):
    compiled = []

    def with_eager_backend(self):  # the default backend would spend its time in a C++ compiler
        compiled.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", with_eager_backend)
    words = ("arch=toy", "arch.dropout=0", "trainer.max_steps=3")
    run = train(tmp_path, *words, "trainer.compile=true")
    plain = train(tmp_path, *words)
    assert len(compiled) == 1
    assert run.weights(3).keys() == plain.weights(3).keys()
    assert run.summary["final_loss"] == pytest.approx(plain.summary["final_loss"], rel=1e-5)


def test_stop_at_ends_the_run_at_that_accuracy(toy, train, tmp_path):
    run = train(tmp_path, "arch=toy", "trainer.max_steps=9", "trainer.val_every=3", "trainer.stop_at=1e-9")
    assert run.summary["steps"] == 3 if run.summary["metrics"]["val"]["acc"] else run.summary["steps"] > 3


def test_max_minutes_ends_the_run_with_a_validation(toy, train, tmp_path):
    run = train(tmp_path, "arch=toy", "trainer.max_steps=1000", "trainer.max_minutes=1e-6")
    assert run.summary["status"] == "finished"
    assert sorted(rows(run, "val/loss")) == [run.summary["steps"]] == [1]


@pytest.mark.parametrize("arch", ["mamba", "transformer"])
def test_text_is_scored_in_bits_per_byte_and_the_model_can_write(arch, train, tmp_path):
    (tmp_path / "text").write_text("".join(f"line {number} of a small text\n" for number in range(2_000)))
    words = ("data=text", f"data.path={tmp_path / 'text'}", "data.seq_len=64", "data.shuffle=true")
    run = train(tmp_path, f"arch={arch}", *words, "trainer.max_steps=2", "trainer.eval_batches=1")
    test = run.summary["metrics"]["test"]
    assert test["bits_per_byte"] == pytest.approx(test["loss"] / math.log(2))
    assert 6 < test["bits_per_byte"] < 9
    assert zoo.generate(zoo.load_pretrained(run.folder), torch.tensor([[100]]), max_new_tokens=2).shape == (1, 3)


@pytest.mark.parametrize("where", ["layer", "parameter"])
def test_a_non_finite_loss_stops_the_run_and_names_step_and_layer(where, toy, train, tmp_path):
    def break_it(mixer, call):
        if call == 6:
            if where == "layer":
                mixer.inner.register_forward_hook(lambda module, args, output: output * float("inf"))
            else:
                with torch.no_grad():
                    mixer.inner.bias[0] = float("nan")

    toy.at_step = break_it
    name = "blocks.0.mixers.0.inner"
    told = f"layer {name}" if where == "layer" else f"parameter {name}.bias"
    with pytest.raises(
        NonFiniteError, match=rf"^step 6: cross_entropy is not finite, first seen in {told}; "
    ) as caught:
        train(tmp_path, "arch=toy", "trainer.max_steps=9", "trainer.val_every=2", "name=x")
    checkpoint = tmp_path / "x" / "checkpoints" / "step-000000004.ckpt"
    assert str(checkpoint) in str(caught.value)
    assert all(torch.isfinite(t).all() for t in torch.load(checkpoint, weights_only=True)["state_dict"].values())
    summary = zoo.train.folder.RunFolder(tmp_path / "x").read_summary()
    assert (summary["status"], summary["steps"]) == ("failed", 5)
    assert "step 6" in summary["error"]


def test_a_non_finite_gradient_under_a_finite_loss_stops_the_run_before_the_update(toy, train, tmp_path):
    weights = []

    def break_it(mixer, call):
        if call == 2:
            weights.append((mixer.inner.weight, mixer.inner.weight.detach().clone()))
            mixer.inner.weight.register_hook(lambda gradient: gradient * float("nan"))

    toy.at_step = break_it
    with pytest.raises(
        NonFiniteError, match=r"^step 2: gradient is not finite, .*parameter blocks.0.mixers.0.inner.weigh"
    ):
        train(tmp_path, "arch=toy", "trainer.max_steps=9")
    parameter, before = weights[0]
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("skipped", [1, 2])
def test_fp16_skips_steps_with_an_overflowing_gradient(skipped, toy, train, tmp_path):
    weights = {}

    def break_it(mixer, call):
        weights[call] = mixer.inner.weight.detach().clone()
        if call == skipped:
            handle = mixer.inner.weight.register_hook(lambda gradient: handle.remove() or gradient * float("inf"))

    toy.at_step = break_it
    run = train(tmp_path, "arch=toy", "trainer.precision=fp16-mixed", "trainer.max_steps=4")
    assert run.summary["status"] == "finished"
    assert [torch.equal(weights[call], weights[call + 1]) for call in (1, 2, 3)] == [skipped == n for n in (1, 2, 3)]


def test_an_architecture_of_too_small_a_vocabulary_is_refused(train, tmp_path):
    with pytest.raises(ConfigError, match=r"^arch.vocab_size=63 is too small for data=mqar, which has 64"):
        train(tmp_path / "runs", "arch=mamba", "arch.vocab_size=63")
    assert not list(tmp_path.iterdir())


def test_data_or_a_model_that_cannot_be_made_leave_no_folder(train, tmp_path):
    (tmp_path / "text").write_text("too short")
    with pytest.raises(DataError, match=r"one window of data.seq_len=512 needs|too short"):
        train(tmp_path / "runs", "arch=mamba", "data=text", f"data.path={tmp_path / 'text'}")
    with pytest.raises(ConfigError, match="n_heads"):
        train(tmp_path / "runs", "arch=transformer", "arch.n_heads=3")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_larger_vocabulary_is_kept(toy, train, tmp_path):
    run = train(tmp_path, "arch=toy", "arch.vocab_size=80", "trainer.max_steps=1")
    assert run.weights(1)["model.embedding.weight"].shape == (80, 16)


def test_running_twice_makes_two_folders_and_a_name_is_taken_once(toy, train, tmp_path):
    first, second = (train(tmp_path, "arch=toy", "trainer.max_steps=1") for _ in range(2))
    assert second.folder.name == f"{first.folder.name}-2"
    train(tmp_path, "arch=toy", "trainer.max_steps=1", "name=mine")
    with pytest.raises(ConfigError, match=r"there is a run .*mine already: resume=true goes on with it, name="):
        train(tmp_path, "arch=toy", "trainer.max_steps=1", "name=mine")


def test_resuming_with_other_settings_names_them(toy, train, tmp_path):
    train(tmp_path, "arch=toy", "trainer.max_steps=1", "name=x")
    with pytest.raises(CheckpointError, match=r"trainer.max_steps: 1 there, 2 now"):
        train(tmp_path, "arch=toy", "trainer.max_steps=2", "name=x", "resume=true")


def test_resuming_a_finished_run_trains_no_more(toy, train, tmp_path):
    first = train(tmp_path, "arch=toy", "trainer.max_steps=2")
    calls = toy.calls
    again = train(tmp_path, "arch=toy", "trainer.max_steps=2", "resume=true")
    assert again.summary == first.summary
    assert toy.calls == calls == 2


def test_resuming_nothing_starts(toy, train, tmp_path):
    assert train(tmp_path, "arch=toy", "trainer.max_steps=2", "resume=true").summary["steps"] == 2


def test_torch_is_left_as_it_was(toy, train, tmp_path):
    assert not torch.are_deterministic_algorithms_enabled()
    train(tmp_path, "arch=toy", "trainer.max_steps=1")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert Path.cwd() == Path.cwd().resolve()


@pytest.mark.parametrize(("arch", "rate"), [("mamba", 2e-3), ("rwkv4", 5e-3)])
def test_a_rate_left_open_is_the_datasets_times_the_architectures(arch, rate):
    for words, expected in (((), rate), (("optim.lr=0.1",), 0.1)):
        config = train_config([f"arch={arch}", "data=mqar", *words])
        assert decide(config, create_source(config.data)).optim.lr == pytest.approx(expected)
