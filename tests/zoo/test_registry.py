"""Registry: names, clashes, plug-ins from installed packages."""

import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest

import zoo
from zoo.kernels.errors import ConfigError, ZooError
from zoo.registry import architecture

PLUGIN = """
from dataclasses import dataclass
from torch import nn
import zoo


@dataclass(kw_only=True)
class EchoConfig(zoo.ModelConfig):
    gain: float = 1.0


@zoo.register("echo", config=EchoConfig)
class Echo(zoo.Mixer):
    '''Echo: a linear map of the present token.'''

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.map = nn.Linear(config.d_model, config.d_model, bias=False)
        self.gain = config.gain

    def forward(self, x, state=None, segment_ids=None):
        return self.gain * self.map(x), state

    def flops(self, seq_len):
        return 2 * seq_len * self.map.weight.numel()
"""

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "echo-plugin"
version = "1"

[project.entry-points."zoo.architectures"]
echo = "{target}"

[tool.hatch.build.targets.wheel]
only-include = ["echo_plugin.py"]
"""


def test_lists_by_pattern() -> None:
    assert {"mamba", "transformer"} <= set(zoo.list_models())
    assert zoo.list_models("mam?a") == ["mamba"]
    assert zoo.list_models("nothing*") == []


def test_unknown_name_names_near_misses() -> None:
    with pytest.raises(ConfigError, match="no architecture 'mambo': did you mean 'mamba'"):
        zoo.create_model("mambo", vocab_size=5)


def test_a_clash_is_an_error() -> None:
    @dataclass(kw_only=True)
    class Other(zoo.ModelConfig):
        pass

    with pytest.raises(ConfigError, match=r"'mamba' is already registered by zoo\.architectures\.mamba\.Mamba"):
        zoo.register("mamba", config=Other)(zoo.Mixer)
    assert architecture("mamba").mixer.__name__ == "Mamba"


def install_plugin(folder, target: str):
    """Builds and installs a real package into a folder of its own; returns that folder."""
    source, site = folder / "source", folder / "site"
    source.mkdir()
    (source / "echo_plugin.py").write_text(PLUGIN)
    (source / "pyproject.toml").write_text(PYPROJECT.format(target=target))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(source)], check=True, capture_output=True)
    return site


def run_with(site, code: str) -> subprocess.CompletedProcess:
    # pip --target is not a site directory, but its metadata is found on sys.path all the same.
    setup = f"import sys; sys.path.insert(0, {str(site)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", setup + textwrap.dedent(code)], capture_output=True, text=True, check=False
    )


def test_plug_in_of_an_installed_package(tmp_path) -> None:
    site = install_plugin(tmp_path, "echo_plugin")
    result = run_with(
        site,
        """
        import torch, zoo
        model = zoo.create_model("echo", vocab_size=7, gain=2.0)
        assert "echo" in zoo.list_models()
        assert model(torch.zeros(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 7)
        print("ran", model.config.gain)
        """,
    )
    assert result.stdout.strip() == "ran 2.0", result.stderr


def test_a_broken_plug_in_is_named(tmp_path) -> None:
    site = install_plugin(tmp_path, "echo_plugin_missing")
    result = run_with(site, "import zoo\ntry:\n    zoo.list_models()\nexcept zoo.ZooError as e:\n    print(e)")
    assert "plug-in 'echo' of package 'echo-plugin' does not load" in result.stdout, result.stderr
    assert issubclass(ConfigError, ZooError)
