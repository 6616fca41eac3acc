"""A run that is killed, interrupted or damaged, and goes on."""

import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from zoo.kernels.errors import CheckpointError
from zoo.train.checkpoint import AtomicCheckpointIO
from zoo.train.errors import Interrupted, RunError
from zoo.train.folder import RunFolder

from .conftest import MQAR, TINY, same


def newest_step(folder) -> int:
    newest = RunFolder(folder).newest_checkpoint()
    return int(newest.stem.partition("-")[2]) if newest else 0


def assert_equal_runs(resumed, undisturbed, step):
    assert same(resumed.weights(step), undisturbed.weights(step))
    for key in ("steps", "tokens", "final_loss", "batch_hash", "batch_hash_after", "metrics", "best_step"):
        assert resumed.summary[key] == undisturbed.summary[key], key
    resumed_rows, rows = ((run.folder / "metrics.csv").read_text().splitlines() for run in (resumed, undisturbed))
    assert [line.split(",")[:4] for line in resumed_rows] == [line.split(",")[:4] for line in rows]
    model = "model/model.safetensors"
    assert (resumed.folder / model).read_bytes() == (undisturbed.folder / model).read_bytes()


def test_kill_9_and_resume_end_bit_identical(train, tmp_path):
    words = ("arch=transformer", "trainer.max_steps=200", "trainer.val_every=10")
    command = [sys.executable, "-m", "zoo.train", *TINY, *MQAR, f"runs_dir={tmp_path}", *words, "name=killed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "killed"
    while newest_step(folder) < 30:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert 30 <= newest_step(folder) < 200
    assert RunFolder(folder).read_summary() is None
    resumed = train(tmp_path, *words, "name=killed", "resume=true")
    assert_equal_runs(resumed, train(tmp_path, *words, "name=undisturbed"), 200)


@pytest.mark.parametrize(
    ("number", "accumulate", "call", "saved"),
    [
        (signal.SIGINT, 1, 5, 5),
        (signal.SIGTERM, 1, 5, 5),
        (signal.SIGINT, 1, 6, 6),  # a validation is due after this step: it runs before the run ends
        (signal.SIGTERM, 1, 6, 6),
        (signal.SIGINT, 2, 9, 5),  # between two batches of a step: the step is finished first
        (signal.SIGINT, 1, 10, None),  # in the last step: the run has ended before it could be interrupted
    ],
)
def test_a_signal_saves_the_run_and_resume_ends_bit_identical(number, accumulate, call, saved, toy, train, tmp_path):
    toy.at_step = lambda mixer, now: now == call and signal.raise_signal(number)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    words = ("arch=toy", "trainer.max_steps=10", "trainer.val_every=3", f"trainer.accumulate={accumulate}")
    with pytest.raises(
        Interrupted, match=r"^interrupted after step \d+: the same command with resume=true goes on in "
    ):
        train(tmp_path, *words, "name=x")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert newest_step(tmp_path / "x") == (saved or 10)
    summary = RunFolder(tmp_path / "x").read_summary()
    assert (summary["status"], summary["steps"]) == ("interrupted", saved or 10)
    assert not (tmp_path / "x" / "model").exists()
    toy.at_step = None
    resumed = train(tmp_path, *words, "name=x", "resume=true")
    assert resumed.summary["wall_seconds"] > summary["wall_seconds"]
    assert_equal_runs(resumed, train(tmp_path, *words), 10)


def test_two_signals_end_the_run_at_once(toy, train, tmp_path):
    def twice(mixer, now):
        if now == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    toy.at_step = twice
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    with pytest.raises(Interrupted):
        train(tmp_path, "arch=toy", "trainer.max_steps=9", "trainer.val_every=3", "name=x")
    assert newest_step(tmp_path / "x") == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_stopped_by_its_accuracy_trains_no_further_when_resumed(toy, train, tmp_path, monkeypatch):
    """Killed between the last checkpoint and the end."""
    words = ("arch=toy", "trainer.max_steps=50", "trainer.val_every=3", "trainer.stop_at=1e-6", "name=x")
    first = train(tmp_path, *words)
    assert first.summary["steps"] < 50
    (first.folder / "summary.json").unlink()
    calls = toy.calls
    again = train(tmp_path, *words, "resume=true")
    assert toy.calls == calls
    assert again.summary["metrics"] == first.summary["metrics"]


def test_a_run_killed_before_its_first_checkpoint_starts_over_in_its_folder(toy, train, tmp_path):
    first = train(tmp_path, "arch=toy", "trainer.max_steps=4", "name=x")
    rows = len((first.folder / "metrics.csv").read_text().splitlines())
    for path in (*first.folder.glob("checkpoints/*"), first.folder / "summary.json"):
        path.unlink()
    again = train(tmp_path, "arch=toy", "trainer.max_steps=4", "name=x", "resume=true")
    assert again.folder == first.folder
    assert again.summary["final_loss"] == first.summary["final_loss"]
    assert len((again.folder / "metrics.csv").read_text().splitlines()) == rows


def test_a_kill_while_writing_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "step-000000001.ckpt"
    writer = AtomicCheckpointIO(None)  # what is written need fit no module
    writer.save_checkpoint({"a": torch.ones(2)}, path)

    def half(checkpoint, file):
        file.write(b"PK half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    for target in (path, tmp_path / "step-000000002.ckpt"):
        with pytest.raises(KeyboardInterrupt):
            writer.save_checkpoint({"a": torch.zeros(2)}, target)
    assert list(tmp_path.glob("*.ckpt")) == [path]
    assert torch.equal(torch.load(path)["a"], torch.ones(2))


def test_a_damaged_checkpoint_is_one_line_with_the_mend(toy, train, tmp_path):
    words = ("arch=toy", "trainer.max_steps=4", "trainer.val_every=2", "name=x")
    first = train(tmp_path, *words)
    (first.folder / "summary.json").unlink()
    newest = RunFolder(first.folder).newest_checkpoint()
    newest.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"step-000000004.ckpt cannot be read .*: delete it, the one before"):
        train(tmp_path, *words, "resume=true")
    os.unlink(newest)
    assert train(tmp_path, *words, "resume=true").summary["final_loss"] == first.summary["final_loss"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda file, other: torch.save({"a": 1}, file), "holds a dictionary of ['a'], not the checkpoint of a run"),
        (lambda file, other: torch.save([1], file), "holds list, not the checkpoint of a run"),
        (lambda file, other: file.write_bytes(other.read_bytes()), "holds another model (transformer: model.blocks.0"),
    ],
)
def test_a_checkpoint_of_something_else_is_one_line_with_the_mend(damage, told, toy, train, tmp_path):
    words = ("arch=toy", "trainer.max_steps=2", "trainer.val_every=2", "name=x")
    other = train(tmp_path, "arch=transformer", "trainer.max_steps=2", "trainer.val_every=2")
    first = train(tmp_path, *words)
    (first.folder / "summary.json").unlink()
    newest = RunFolder(first.folder).newest_checkpoint()
    damage(newest, RunFolder(other.folder).newest_checkpoint())
    with pytest.raises(CheckpointError, match=re.escape(told)) as caught:
        train(tmp_path, *words, "resume=true")
    assert str(caught.value).startswith(str(newest))
    assert str(caught.value).endswith(": delete it, the one before it is used then")


def test_a_file_that_is_named_like_a_checkpoint_only_by_half_is_left_alone(toy, train, tmp_path):
    words = ("arch=toy", "trainer.max_steps=4", "trainer.val_every=1", "name=x", "trainer.keep_checkpoints=1")
    first = train(tmp_path, *words)
    stray = first.folder / "checkpoints" / "step-abc.ckpt"
    stray.touch()
    (first.folder / "summary.json").unlink()
    assert train(tmp_path, *words, "resume=true").summary["final_loss"] == first.summary["final_loss"]
    assert stray.exists()


@pytest.mark.parametrize("text", ["{}", '{"status": "finished"}', "{", '{"status": "finished", "metrics": {}}'])
def test_a_damaged_summary_is_made_again(text, toy, train, tmp_path):
    words = ("arch=toy", "trainer.max_steps=2", "name=x")
    first = train(tmp_path, *words)
    (first.folder / "summary.json").write_text(text)
    calls = toy.calls
    assert train(tmp_path, *words, "resume=true").summary["metrics"] == first.summary["metrics"]
    assert toy.calls == calls


@pytest.mark.parametrize("given", [("name=x",), ()])
def test_damaged_settings_are_named(given, toy, train, tmp_path):
    words = ("arch=toy", "trainer.max_steps=2", *given)
    first = train(tmp_path, *words)
    (first.folder / "config.yaml").write_text("a: [")
    with pytest.raises(CheckpointError, match=r"^resume=true: .*config.yaml is damaged, .*restore it, or .* name="):
        train(tmp_path, *words, "resume=true")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("where", ["checkpoint", "metrics", "model"])
def test_a_full_disk_is_one_line_and_loses_nothing(where, toy, train, tmp_path, monkeypatch):
    words = ("arch=toy", "trainer.max_steps=4", "trainer.val_every=2", "name=x")
    undisturbed = train(tmp_path, *words[:-1])

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "checkpoint":
            toy.at_step = lambda mixer, call: call == 7 and patch.setattr("torch.save", full)
        elif where == "metrics":
            toy.at_step = lambda mixer, call: call == 7 and patch.setattr("csv.DictWriter.writerow", full)
        else:
            patch.setattr("zoo.pretrained.weights.save_file", full)
        patch.setattr(RunFolder, "write_summary", full)
        with pytest.raises(RunError, match=r"^the disk is full after step \d \(.*/x\): make room, .*resume=true$"):
            train(tmp_path, *words)
    toy.at_step = None
    assert not list(tmp_path.rglob("*.part"))
    assert_equal_runs(train(tmp_path, *words, "resume=true"), undisturbed, 4)
