"""What is shown of a model's memory after the test."""

import json
from types import SimpleNamespace

import pytest
import torch

from zoo.train import diagnostics
from zoo.train.data.stream import IGNORE
from zoo.train.objectives import Objective

CPU = torch.device("cpu")


class Shows(torch.nn.Module):
    """A model of blocks of 4 tokens that shows what it is given."""

    def __init__(self, **shown: torch.Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(block_size=4)
        self.shown = {name.replace("__", "/"): value for name, value in shown.items()}

    def diagnose(self, tokens, *, segment_ids=None, state=None):
        return self.shown


def collect(model: Shows, positions: list[int] | None, asked: list[int]) -> dict:
    """What is found on one batch of rows of 16 tokens with a label at `asked`."""
    targets = torch.full((len(asked), 16), IGNORE)
    targets[torch.arange(len(asked)), torch.tensor(asked)] = 1
    batch = {"inputs": torch.zeros(len(asked), 16).long(), "targets": targets}
    source = SimpleNamespace(answer_positions=lambda b: None if positions is None else torch.tensor(positions))
    data = SimpleNamespace(source=source, test_dataloader=lambda: [batch])
    module = SimpleNamespace(model=model, carries=False, objective=Objective())
    return diagnostics.collect(module, data, CPU)


def test_masses_are_means_by_layer():
    mass = torch.tensor([[[0.2, 0.3, 0.5], [0.0, 0.1, 0.9]], [[0.2, 0.2, 0.6], [0.0, 0.0, 1.0]]])  # (B, H, 3)
    found = collect(Shows(memory_mass__0=mass, memory_mass__1=mass[:, :1]), None, [3, 3])
    assert found["memory_mass"]["0"] == pytest.approx({"compressed memory": 0.1, "memory": 0.15, "own segment": 0.75})
    assert found["memory_mass"]["1"] == pytest.approx({"compressed memory": 0.2, "memory": 0.25, "own segment": 0.55})


def test_blocks_read_are_set_against_the_block_of_the_answer():
    chosen = torch.full((3, 16, 2, 2), -1)  # (B, T, H, k)
    chosen[0, 15] = torch.tensor([[1, 0], [2, 0]])  # asked in block 3, the answer in block 1: one head of two reads it
    chosen[1, 14] = torch.tensor([[2, -1], [2, 1]])  # the answer in block 2: both
    chosen[2, 5] = torch.tensor([[0, -1], [0, -1]])  # the answer in the own block: no question of retrieval
    found = collect(Shows(retrieved__0=chosen), [6, 8, 4], [15, 14, 5])["retrieved"]["0"]
    assert found["found"] == pytest.approx((0.5 + 1) / 2)
    assert found["alike"] == pytest.approx((2 / 3 + 1.5 / 3) / 2)
    assert found["questions"] == 2
    assert found["read"] == [[1, 0, 1.0], [1, 1, 0.5], [1, 2, 0.5], [2, 1, 0.5], [2, 2, 1.0]]


def test_tokens_that_choose_for_all_heads_and_weights_are_read_alike():
    chosen = torch.full((1, 16, 1), 1)
    assert collect(Shows(retrieved__2=chosen), [4], [12])["retrieved"]["2"]["found"] == 1
    weights = torch.tensor([0.1, 0.6, 0.2, 0.0]).expand(1, 16, 2, 4)
    told = collect(Shows(landmark_weights__0=weights), [4], [12])["landmark_weights"]["0"]
    assert (told["found"], told["alike"]) == (pytest.approx(0.6), pytest.approx(0.3))


def test_where_nothing_is_known_nothing_is_told():
    chosen = torch.full((1, 16, 1), 1)
    assert collect(Shows(), [4], [12]) == {}
    assert collect(Shows(retrieved__0=chosen), None, [12]) == {}
    assert collect(Shows(retrieved__0=chosen), [12], [13]) == {}, "the answer stands in the own block"


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("arch=landmark", "arch.top_k=1", "arch.block_size=4", "data=passkey", "data.test_lengths=[32]"), "retrieved"),
        (("arch=compressive", "arch.segment=8", "arch.memory=8", "data=text"), "memory_mass"),
    ],
)
def test_a_run_keeps_numbers_and_a_picture(words, kind, train, tmp_path):
    more = ["data.seq_len=32", "trainer.max_steps=2", "trainer.val_every=2"]
    if kind == "memory_mass":
        (tmp_path / "book.txt").write_text("".join(f"{n} times {n} is {n * n}. " for n in range(400)))
        more += [f"data.path={tmp_path / 'book.txt'}", "trainer.segment_length=16", "data.eval_batch_size=2"]
    run = train(tmp_path, *words, *more)
    found = json.loads((run.folder / "diagnostics.json").read_text())
    assert found[kind].keys() == {"0"}
    if kind == "memory_mass":
        shares = found[kind]["0"]
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares.values()) > 0.05, "the state was carried from segment to segment, or nothing is compressed"
    else:
        assert found[kind]["0"]["questions"] > 10
    assert (run.folder / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
