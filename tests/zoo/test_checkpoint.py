"""Saving and loading: damaged and foreign files are refused in one line."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.kernels.errors import CheckpointError, ConfigError


@pytest.fixture
def folder(tmp_path):
    zoo.save_pretrained(zoo.create_model("mamba", vocab_size=7, d_model=8), tmp_path)
    return tmp_path


def edit(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_dtype_and_run_folder(folder, tmp_path_factory) -> None:
    assert zoo.load_pretrained(folder, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16
    run = tmp_path_factory.mktemp("run")
    folder.rename(run / "model")
    assert not zoo.load_pretrained(run).training


BUILT = """
import sys, torch, zoo
torch.manual_seed(0)
before = torch.get_rng_state()
for name in zoo.list_models():
    folder = f"{sys.argv[1]}/{name}"
    model = zoo.load_pretrained(folder)
    assert not any(parameter.is_meta for parameter in model.parameters())
assert torch.equal(torch.get_rng_state(), before)
assert "torch._dynamo" not in sys.modules
"""


def test_loading_neither_draws_nor_imports_the_compiler(tmp_path) -> None:
    for name in zoo.list_models():
        zoo.save_pretrained(zoo.create_model(name, vocab_size=7, d_model=16), tmp_path / name)
    done = subprocess.run([sys.executable, "-c", BUILT, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


PEAK = """
import sys, torch, zoo
from zoo.memory import PeakMemory
zoo.load_pretrained(sys.argv[2])  # what is imported when it is needed
memory = PeakMemory(torch.device("cpu"))
memory.reset()
before = memory.bytes()
model = zoo.load_pretrained(sys.argv[1])
print(memory.bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not forget an earlier peak")
@pytest.mark.parametrize("format", ["zoo", "transformers"])
def test_peak_memory_is_that_of_the_weights(folder, format, tmp_path_factory) -> None:
    large = tmp_path_factory.mktemp("large")
    zoo.save_pretrained(zoo.create_model("transformer", vocab_size=4096, d_model=1024), large, format=format)
    size = (large / "model.safetensors").stat().st_size
    assert size > 100e6
    command = [sys.executable, "-c", PEAK, str(large), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 * size < int(done.stdout) < 1.1 * size


def test_initialisations_that_mix_matrices_and_vectors(folder, monkeypatch) -> None:
    def mixing(*args, **settings):
        assert (torch.empty(3, 2) * torch.ones(2)).is_meta
        return zoo.create_model(*args, **settings)

    monkeypatch.setattr("zoo.checkpoint.create_model", mixing)
    zoo.load_pretrained(folder)


def test_stored_in_a_smaller_type(folder) -> None:
    exact = zoo.load_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    zoo.save_pretrained(exact, folder, stored_dtype=torch.bfloat16)
    assert (folder / "model.safetensors").stat().st_size < 0.7 * size
    rounded = zoo.load_pretrained(folder)
    for name, weights in exact.state_dict().items():
        assert rounded.state_dict()[name].dtype == torch.float32
        assert torch.equal(rounded.state_dict()[name], weights.bfloat16().float())
    assert zoo.load_pretrained(folder, dtype=torch.float16).norm.weight.dtype == torch.float16
    with pytest.raises(ConfigError, match="stored_dtype has no word in transformers"):
        zoo.save_pretrained(exact, folder, format="transformers", stored_dtype=torch.bfloat16)


def describe(folder, **changes) -> None:
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(description | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no model"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "not written by the zoo"),
        (lambda f: describe(f, tokenizer=5), "config.json was not written by the zoo, or changed since: tokenizer is"),
        (lambda f: describe(f, architecture=["mamba"]), "architecture is missing or of the wrong kind"),
        (lambda f: describe(f, architecture="transformer"), "config.json describes no model (architecture 'transfo"),
        (lambda f: describe(f, dtype="int8"), "has dtype='int8': expected one of float16, bfloat16, float32, float64"),
        (lambda f: describe(f, dtype=["float32"]), "has dtype=['float32']: expected one of"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be read"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:99]),
            "cannot be read",
        ),
        (lambda f: edit(f, lambda w: w.pop("norm.weight")), "missing ['norm.weight']"),
        (lambda f: edit(f, lambda w: w.update(more=torch.ones(1))), "unexpected ['more']"),
        (lambda f: edit(f, lambda w: w.update({"norm.weight": torch.ones(3)})), "norm.weight has shape (3,)"),
    ],
)
def test_damage_is_named(folder, damage, message) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        zoo.load_pretrained(folder)


def test_weights_of_another_architecture(folder) -> None:
    description = json.loads((folder / "config.json").read_text())
    description |= {"architecture": "transformer", "config": {"vocab_size": 7, "d_model": 8}}
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"does not fit its config.json \(transformer\): missing"):
        zoo.load_pretrained(folder)
