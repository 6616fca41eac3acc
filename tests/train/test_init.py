"""`init=`: a run that starts from the weights of another model."""

import pytest
import yaml
from safetensors.torch import load_file

from zoo.kernels.errors import CheckpointError, ConfigError

from .conftest import same

# The settings of a model may be lists, texts and nulls, and one of them is not the default of the tests.
SETTINGS = ("arch=longformer", "arch.d_model=16", "arch.n_layers=2", "arch.windows=[3,5]", "arch.feed_forward=gelu")


@pytest.fixture
def first(train, tmp_path):
    return train(tmp_path, *SETTINGS, "trainer.max_steps=2", "name=first")


def weights(run):
    return load_file(run.folder / "model" / "model.safetensors")


def test_the_model_and_its_settings_are_those_of_the_other(train, tmp_path, first) -> None:
    words = ("arch.d_model=16", "arch.n_layers=2")  # the tests' own, which would change them
    still = train(tmp_path, f"init={first.folder}", *words, "trainer.max_steps=1", "optim.lr=1e-30", "name=still")
    assert same(weights(still), weights(first))
    arch = yaml.safe_load((still.folder / "config.yaml").read_text())["arch"]
    assert (arch["name"], arch["windows"], arch["feed_forward"]) == ("longformer", [3, 5], "gelu")
    moved = train(tmp_path, f"init={first.folder}", *words, "trainer.max_steps=1", "arch.window=9", "arch.windows=null")
    assert not same(weights(moved), weights(first))
    assert moved.summary["config"]["init"] == str(first.folder)


def test_a_resumed_run_does_not_start_again(train, tmp_path, first) -> None:
    words = (f"init={first.folder}", "arch.n_layers=2", "trainer.max_steps=6", "trainer.val_every=3")
    whole = train(tmp_path, *words, "name=whole")
    checkpoints = whole.folder / "checkpoints"
    (whole.folder / "summary.json").unlink()
    (checkpoints / "step-000000006.ckpt").unlink()
    before = weights(whole)
    resumed = train(tmp_path, *words, "name=whole", "resume=true")
    assert same(weights(resumed), before)


def test_bad_input_is_one_line(train, tmp_path, first) -> None:
    with pytest.raises(ConfigError, match=r"^arch=mamba does not fit init=.*, which is a longformer: leave arch out$"):
        train(tmp_path, f"init={first.folder}", "arch=mamba")
    with pytest.raises(ConfigError, match=r"does not fit the settings of arch: .* is \(.*\) there and \(.*\) here"):
        train(tmp_path, f"init={first.folder}", "arch.n_layers=2", "arch.d_model=32")
    with pytest.raises(ConfigError, match=r"does not fit the settings of arch: blocks\.1.* there and missing here"):
        train(tmp_path, f"init={first.folder}", "arch.n_layers=1", "arch.windows=null")
    with pytest.raises(ConfigError, match="expected one model"):
        train(tmp_path, "init=a,b")
    with pytest.raises(CheckpointError, match=r"nowhere.*expected|no folder '.*nowhere'"):
        train(tmp_path, f"init={tmp_path}/nowhere")
