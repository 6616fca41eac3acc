"""What is shown of a model's memory after the test."""

import errno
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zoo.kernels.errors import DataError
from zoo.layers.landmark_tokens import LandmarkTokens
from zoo.train import diagnostics
from zoo.train.data import DataModule, NeedleConfig
from zoo.train.data.needle import NEEDLE, QUERY
from zoo.train.data.stream import IGNORE
from zoo.train.folder import RunFolder
from zoo.train.objectives import Objective

CPU = torch.device("cpu")


class Shows(torch.nn.Module):
    """A model of blocks of 4 tokens that shows what it is given."""

    def __init__(self, **shown: torch.Tensor) -> None:
        super().__init__()
        self.wrapper = LandmarkTokens(1, 4, causal=True)
        self.shown = {name.replace("__", "/"): value for name, value in shown.items()}

    def diagnose(self, tokens, *, segment_ids=None, state=None):
        return self.shown


def collect(model: Shows, positions: list[int] | None, asked: list[int]) -> dict:
    """What is found on one batch of rows of 16 tokens with a label at `asked`."""
    rows = torch.arange(len(asked))
    targets, at = torch.full((len(asked), 16), IGNORE), torch.full((len(asked), 16), -1)
    targets[rows, torch.tensor(asked)] = 1
    at[rows, torch.tensor(asked)] = torch.tensor(positions or 0)
    batch = {"inputs": torch.zeros(len(asked), 16).long(), "targets": targets}
    source = SimpleNamespace(answer_positions=lambda b: None if positions is None else at)
    return of_data(model, SimpleNamespace(source=source, test_dataloader=lambda: [batch]))


def of_data(model: torch.nn.Module, data: Any) -> dict:
    return diagnostics.collect(SimpleNamespace(model=model, carries=False, objective=Objective()), data, CPU)


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


class Knows(Shows):
    """Reads, at each label of `data=needle`, the block `behind` tokens after the marker of the needle it asks for."""

    def __init__(self, behind: int) -> None:
        super().__init__()
        self.behind = behind

    def diagnose(self, tokens, *, segment_ids=None, state=None):
        chosen = torch.full((*tokens.shape, 1), -1)
        for row, line in zip(chosen, tokens.tolist(), strict=True):
            question = line.index(QUERY)
            markers = [i for i in range(question) if line[i] == NEEDLE]
            asked = [m for key in line[question + 1 : question + 3] for m in markers if line[m + 1] == key]
            for label, marker in enumerate(asked):
                row[question + 2 + label] = (marker + self.behind) // 4
        return {"retrieved/0": chosen}


def test_every_label_asks_for_the_block_of_its_own_value():
    config = NeedleConfig(seq_len=60, test_lengths=[60], num_examples=8, test_examples=32, n_queries=2, n_values=2)
    data = DataModule(config, seed=0)
    found = of_data(Knows(behind=2), data)["retrieved"]["0"]
    assert (found["found"], found["questions"]) == (1, 32 * 4)
    marker = of_data(Knows(behind=0), data)["retrieved"]["0"]["found"]
    assert 0.4 < marker < 0.6, "half of all values begin in the block after their marker's"


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("arch=landmark", "arch.top_k=1", "arch.block_size=4", "data=passkey", "data.test_lengths=[32]"), "retrieved"),
        (
            (
                "arch=hybrid",
                "arch.n_layers=2",
                "arch.pattern=[bigbird,landmark]",
                "arch.members={landmark: {block_size: 4}, bigbird: {block_size: 8}}",
                "data=passkey",
                "data.test_lengths=[32]",
            ),
            "landmark_weights",
        ),
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


def test_a_run_finishes_without_and_resuming_makes_them(train, tmp_path, capsys, monkeypatch):
    words = ("arch=landmark", "arch.block_size=4", "data=passkey", "data.seq_len=32", "data.test_lengths=[32]")
    words += ("trainer.max_steps=2", "name=short")
    lost = []

    def full(folder, found):
        lost.append(found)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunFolder, "write_diagnostics", full)
    run = train(tmp_path, *words)
    assert run.summary["status"] == "finished"
    told = capsys.readouterr().err
    assert told.startswith(f"warning: {run.folder} is finished, but without diagnostics: the disk is full")
    assert told.count("\n") == 1
    monkeypatch.undo()
    assert train(tmp_path, *words, "resume=true").summary == run.summary
    assert json.loads((run.folder / "diagnostics.json").read_text()) == lost[0], "of the weights that were trained"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("no such block"), "no such block"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "out of memory: lower "),
        (AttributeError("no block_size"), "AttributeError: no block_size (not foreseen: ZOO_DEBUG=1 shows the trace"),
    ],
)
def test_what_goes_wrong_is_a_line_and_can_be_seen_in_full(error, line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(diagnostics, "collect", lambda *args: (_ for _ in ()).throw(error))
    module = SimpleNamespace(model=None)
    diagnostics.write(RunFolder(tmp_path), module, None, CPU)
    told = capsys.readouterr().err
    assert told.startswith(f"warning: {tmp_path} is finished, but without diagnostics: {line}")
    assert told.count("\n") == 1
    monkeypatch.setenv("ZOO_DEBUG", "1")
    with pytest.raises(type(error)):
        diagnostics.write(RunFolder(tmp_path), module, None, CPU)
