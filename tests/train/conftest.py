"""A datasets cache of the tests' own, tiny runs, and a misbehaving architecture."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from torch import nn

from zoo import registry
from zoo.config import ModelConfig
from zoo.mixer import Mixer
from zoo.settings import setting
from zoo.train.config import train_config
from zoo.train.run import run

# Nothing is learnt at this size; the runs show that the machinery does what it should.
TINY = [
    "arch.d_model=16",
    "arch.n_layers=1",
    "data.batch_size=8",
    "data.num_examples=256",
    "data.validation_examples=32",
    "data.test_examples=32",
    "trainer.accelerator=cpu",
    "trainer.log_every=1",
]
# One length, so that every batch has as many tokens.
MQAR = ["data.seq_len=32", "data.num_pairs=4"]


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("datasets-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        yield


@dataclass
class Trained:
    """A run that has ended."""

    folder: Path
    summary: dict[str, Any]

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        path = self.folder / "checkpoints" / f"step-{step:09d}.ckpt"
        return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="session")
def train() -> Callable[..., Trained]:
    """Trains a tiny model: `train(runs_dir, "arch=toy", "trainer.max_steps=5")`; prints nothing."""

    def go(runs_dir: Path, *words: str) -> Trained:
        data = [] if any(word.startswith("data=") for word in words) else MQAR
        config = train_config([*TINY, *data, f"runs_dir={runs_dir}", *words])
        summary = run(config, console=Console(quiet=True))
        folder = Path(summary["folder"])
        strict = json.loads((folder / "summary.json").read_text(), parse_constant=lambda word: pytest.fail(word))
        assert strict.keys() == summary.keys()
        return Trained(folder, strict)

    return go


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@dataclass(kw_only=True)
class ToyConfig(ModelConfig):
    """Settings of the toy."""

    dropout: float = setting(0.5, "share of channels dropped", minimum=0, maximum=1)


class Toy(Mixer):
    """Dropout and a causal mean, with a switch that tests flip: `at_step` is called in each training forward."""

    at_step: Callable[["Toy", int], None] | None = None
    calls = 0

    def __init__(self, config: ToyConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.dropout = nn.Dropout(config.dropout)
        self.inner = nn.Linear(config.d_model, config.d_model)
        self.scale = 1.0

    def forward(self, x: torch.Tensor, state: Any = None, segment_ids: Any = None) -> tuple[torch.Tensor, Any]:
        if self.training and torch.is_grad_enabled():
            type(self).calls += 1
            if type(self).at_step is not None:
                type(self).at_step(self, type(self).calls)
        torch.rand(1)  # also in evaluation, which must not disturb training
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.inner(self.dropout(x).cumsum(1) / count) * self.scale, None

    def flops(self, seq_len: int) -> int:
        return 2 * seq_len * self.inner.weight.numel()


@pytest.fixture
def toy() -> Iterator[type[Toy]]:
    """The toy, registered as `arch=toy` for one test."""
    Toy.at_step, Toy.calls = None, 0
    registry.register("toy", config=ToyConfig)(Toy)
    yield Toy
    del registry._REGISTRY["toy"]
