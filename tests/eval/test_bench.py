"""Costs against length, crossovers, and operators against each other."""

import functools
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import zoo
from zoo.console import run_cli
from zoo.eval.bench import BenchSettings, bench, cost, machine
from zoo.eval.bench import command as bench_command
from zoo.eval.bench import kernels as kernels_bench
from zoo.eval.bench import measurement as bench_module
from zoo.eval.bench.cost import KINDS, CostSettings, Job, measure
from zoo.eval.bench.crossover import first_length
from zoo.eval.bench.figure import draw
from zoo.eval.bench.kernel_cases import CASES, Case
from zoo.flops import count_flops
from zoo.kernels import backends
from zoo.kernels.errors import DataError
from zoo.model import create_model

TINY = {"vocab_size": 11, "d_model": 24}
ONCE = CostSettings(repeats=1)
ROW = {"label", "arch", "kind", "length", "batch", "seconds", "tokens_per_second", "peak_memory_bytes", "state_bytes"}
ROW |= {"flops", "flops_share", "bytes_share", "backends", "status", "reason"}


def tiny(arch: str, **settings: Any) -> Callable[[], zoo.Model]:
    return functools.partial(create_model, arch, **TINY | settings)


def tensors(state: Any) -> list[torch.Tensor]:
    return [state] if isinstance(state, torch.Tensor) else [tensor for part in state or () for tensor in tensors(part)]


# What one model costs.


@pytest.mark.parametrize("arch", zoo.list_models())
def test_measured_is_what_the_architecture_declares_and_holds(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "STEPS", 1)
    length, batch = 33, 3
    found = {kind: measure(tiny(arch), Job(kind, length, batch), ONCE) for kind in KINDS}
    for row in found.values():
        assert row["status"] == "ok", row["reason"]
        assert row["arch"] == arch
        assert row["peak_memory_bytes"] >= 0
        assert 0 < row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
    model, tokens = create_model(arch, **TINY).eval(), torch.zeros(batch, length, dtype=torch.long)
    forward = count_flops(lambda: model(tokens))
    assert found["prefill"]["flops_declared"] == pytest.approx(forward, rel=0.01)
    for kind in ("prefill", "decode"):  # segments and their memory cost a state more than they cost a whole sequence
        assert found[kind]["flops"] >= 0.99 * found[kind]["flops_declared"]
        if arch not in ("compressive", "transformer_xl", "landmark"):
            assert found[kind]["flops"] == pytest.approx(found[kind]["flops_declared"], rel=0.01)
    assert 2.5 < found["train"]["flops"] / forward < 4.5

    state = model(tokens, state=model.init_state(batch)).state
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors(state))
    assert batch * found["prefill"]["state_bytes"] == held
    assert found["train"]["state_bytes"] is None
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert found["decode"]["least_bytes"] == weights + batch * found["decode"]["state_bytes"]


def test_memory_counts_activations_and_caches_but_no_weights() -> None:
    batch, length, mib = 4, 512, 2**20
    make = tiny("transformer", vocab_size=4096, d_model=64, n_layers=1)
    logits = 4 * batch * length * 4096
    found = {kind: measure(make, Job(kind, length, batch), ONCE) for kind in KINDS}
    memory = {kind: row["peak_memory_bytes"] for kind, row in found.items()}
    assert logits <= memory["prefill"] < logits + 16 * mib
    assert 3 * logits <= memory["train"] < 5 * logits  # logits, their logarithms and their gradient
    assert batch * found["decode"]["state_bytes"] <= memory["decode"] < logits / 2


def test_a_decoding_step_is_the_median_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = cost.Subject(tiny("mamba"), Job("decode", 8, 1), ONCE)
    subject.read(subject.draw(8))
    clock = iter([0, 1, 10, 12, 20, 23, 30, 39, 40, 44, 50, 55, 60, 66, 70, 77])  # seconds 1 2 3 9 4 5 6 7
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert subject.time() == 4.5
    assert int(subject.state.position) == 8 + 8


def test_what_takes_too_long_is_too_slow() -> None:
    for kind in KINDS:
        row = measure(tiny("mamba"), Job(kind, 8, 1), CostSettings(max_seconds=1e-9))
        assert row["status"] == "too_slow"
        assert "seconds: too long to measure in max_seconds=1e-09" in row["reason"]


def test_what_cannot_run_says_why() -> None:
    row = measure(tiny("transformer", max_positions=16), Job("train", 32, 1), ONCE)
    assert (row["status"], "longer than max_positions=16" in row["reason"]) == ("failed", True)
    row = measure(tiny("mamba", causal=False), Job("decode", 8, 1), ONCE)
    assert "causal=false and so no state" in row["reason"]


def test_rivals_race_in_turn_and_who_cannot_run_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(cost.Subject, "time", lambda self: self.call() or order.append(self.model.architecture) or 1.0)
    times = cost.race([tiny("mamba"), tiny("rwkv4")], Job("train", 8, 1), ONCE, 2)
    assert times == [[1.0, 1.0], [1.0, 1.0]]
    assert order == ["mamba", "rwkv4", "mamba", "rwkv4", "rwkv4", "mamba"]  # once to warm up
    assert cost.race([tiny("mamba")], Job("decode", 8, 1), CostSettings(max_seconds=1e-9), 2) == [[math.inf, math.inf]]
    with pytest.raises(DataError, match="max_positions=16"):
        cost.race([tiny("transformer", max_positions=16)], Job("train", 32, 1), ONCE, 2)


def test_training_in_bf16_keeps_its_weights_and_decoding_does_not() -> None:
    weights = {}
    for kind in ("train", "decode"):
        subject = cost.Subject(tiny("mamba"), Job(kind, 8, 1), CostSettings(dtype="bf16"))
        weights[kind] = subject.model.embedding.weight.dtype
    assert weights == {"train": torch.float32, "decode": torch.bfloat16}


def test_out_of_memory_and_killed_processes_are_results() -> None:
    with bench_module._Measurer(BenchSettings(repeats=1, memory=0.4)) as measurer:
        make = tiny("mamba", vocab_size=4096, n_layers=1)
        row = measurer.measure(make, Job("prefill", 64, 1))
        assert row["status"] == "ok", row["reason"]
        row = measurer.measure(make, Job("prefill", 65_536, 1))  # a GiB of logits
        assert row["status"] == "out_of_memory"
        assert "allocate" in row["reason"]
        row = measurer.measure(functools.partial(signal.raise_signal, signal.SIGKILL), Job("prefill", 64, 1))  # type: ignore[arg-type]
        assert row == {"status": "out_of_memory", "reason": row["reason"]}
        assert "killed" in row["reason"]
        assert measurer.child is None


def test_a_process_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "START", 0.1)
    with bench_module._Measurer(BenchSettings(max_seconds=0.1)) as measurer:
        row = measurer.measure(functools.partial(time.sleep, 60), Job("train", 8, 1))  # type: ignore[arg-type]
        assert (row["status"], row["reason"]) == ("too_slow", "no answer within 0.3 seconds")


# Crossovers, with a clock and a memory of our own.


class FakeMeasurer:
    """Costs by formula: a maker is the label's index. Seconds and bytes of a length; None: out of memory there."""

    curves: dict[int, Callable[[int], tuple[float | None, float]]]
    spread = 0.01
    calls: list[int]

    def __init__(self, settings: BenchSettings) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, function, makers, job, settings, rounds):
        assert function is cost.race
        self.calls.append(job.length)
        assert rounds == settings.repeats
        return [[math.inf if (s := self.curves[maker](job.length)[0]) is None else s] * rounds for maker in makers]

    def measure(self, maker, job):
        seconds, memory = self.curves[maker](job.length)
        if seconds is None:
            return {"status": "out_of_memory", "reason": "none left"}
        low, high = seconds * (1 - self.spread), seconds * (1 + self.spread)
        times = {"median": seconds, "min": low, "max": high, "repeats": 5}
        figures = {"flops": 10**9, "least_bytes": 10**6, "state_bytes": 8, "backends": {}}
        return {"status": "ok", "reason": None, "seconds": times, "peak_memory_bytes": memory} | figures


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeMeasurer]:
    limits = {"matmul_gflops": 100.0, "copy_gbytes_per_second": 10.0}
    monkeypatch.setattr(bench_module, "_Measurer", FakeMeasurer)
    monkeypatch.setattr(bench_module, "reaches", lambda device, dtype: limits)
    monkeypatch.setattr(FakeMeasurer, "calls", [], raising=False)
    monkeypatch.setattr(FakeMeasurer, "curves", {0: lambda T: (T * T * 1e-6, 1e9), 1: lambda T: (T * 1e-3, 1e9)}, False)
    return FakeMeasurer


def two(**settings: Any) -> dict[str, Any]:
    config = BenchSettings(kinds=["train"], lengths=[512, 2048], **settings)
    return bench([("transformer", 0), ("mamba", 1)], config)  # type: ignore[list-item]


def test_a_crossover_is_measured_between_the_lengths(fake) -> None:
    (found,) = two()["crossovers"]
    assert found == {
        "kind": "train",
        "quantity": "time",
        "faster": "mamba",
        "slower": "transformer",
        "from_length": 1024,  # alike at 1,000; a grid of 128, because one of 64 has more than 16 places here
        "measured": True,
        "text": "from T = 1,024 on, mamba trains faster than transformer on this machine",
    }
    assert fake.calls[0] == 2048
    assert len(fake.calls) <= 5


def test_rows_have_shares_of_what_the_machine_reaches(fake) -> None:
    row = two(batch_tokens=1024)["rows"][0]
    assert row.keys() >= ROW
    assert (row["label"], row["length"], row["batch"]) == ("transformer", 512, 2)
    seconds = 512 * 512 * 1e-6
    assert row["tokens_per_second"] == pytest.approx(1024 / seconds)
    assert row["flops_share"] == pytest.approx(1 / seconds / 100)
    assert row["bytes_share"] == pytest.approx(1e-3 / seconds / 10)


def test_alike_within_the_spread_is_no_crossover(fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "spread", 0.5)
    fake.curves = {0: lambda T: (T * 1e-3 * (1.2 if T > 999 else 0.9), 1e9), 1: lambda T: (T * 1e-3, 1e9)}
    assert two()["crossovers"] == []
    monkeypatch.setattr(fake, "spread", 0.01)  # certain in the rows, but not when they race
    monkeypatch.setattr(fake, "call", lambda *_: [[1.0, 2.0], [2.0, 1.0]])
    assert two()["crossovers"] == []


def test_running_out_of_memory_is_a_crossover(fake) -> None:
    fake.curves = {0: lambda T: (1e-3 if T < 1500 else None, 1e6), 1: lambda T: (2e-3, 2e6)}
    found = two()
    failed = [row for row in found["rows"] if row["status"] != "ok"]
    assert [(row["label"], row["length"], row["seconds"]) for row in failed] == [("transformer", 2048, None)]
    by_time, by_memory = found["crossovers"]
    assert by_time["text"] == (
        "from T = 1,536 on, mamba trains faster than transformer on this machine; at T = 2,048 transformer runs out of "
        "memory"
    )
    assert (by_memory["quantity"], by_memory["from_length"], by_memory["faster"]) == ("memory", 1536, "mamba")


def test_longer_lengths_are_not_tried_after_a_failure(fake) -> None:
    fake.curves[0] = lambda T: (1e-3 if T < 600 else None, 1e9)
    rows = bench([("a", 0)], BenchSettings(kinds=["decode"], lengths=[4096, 512, 2048]))["rows"]  # type: ignore[list-item]
    assert [row["length"] for row in rows] == [512, 2048, 4096]
    assert [row["status"] for row in rows] == ["ok", "out_of_memory", "out_of_memory"]
    assert rows[2]["reason"] == "not tried: so it was at 2,048"


def test_memory_has_crossovers_of_its_own(fake) -> None:
    fake.curves = {0: lambda T: (T * 1.0, T * T), 1: lambda T: (T * 2.0, 1000 * T)}
    (found,) = two()["crossovers"]
    assert (found["quantity"], found["faster"]) == ("memory", "mamba")
    assert found["text"] == "from T = 1,152 on, mamba needs less memory to train than transformer on this machine"


def test_without_time_a_crossover_is_told_and_not_measured(fake) -> None:
    (found,) = two(crossovers=0)["crossovers"]
    assert fake.calls == []
    assert (found["measured"], found["from_length"]) == (False, 2048)
    assert "between T = 512 and T = 2,048" not in found["text"]
    assert "between T = 512 and 2,048" in found["text"]
    assert "not narrowed down" in found["text"]


def test_a_change_of_order_that_is_undone_ends_there(fake) -> None:
    """mamba, rwkv7 and mamba again: the first change is not said to hold for good."""
    fake.curves = {0: lambda T: (T * 1e-3, 1e9), 1: lambda T: (T * (2e-3 if T < 256 or T >= 1024 else 5e-4), 1e9)}
    models, settings = [("mamba", 0), ("rwkv7", 1)], {"kinds": ["train"], "lengths": [128, 512, 2048]}
    texts = [entry["text"] for entry in bench(models, BenchSettings(**settings))["crossovers"]]  # type: ignore[arg-type]
    assert texts == [
        "from T = 256 until T = 1,024, rwkv7 trains faster than mamba on this machine",
        "from T = 1,024 on, mamba trains faster than rwkv7 on this machine",
    ]
    texts = [entry["text"] for entry in bench(models, BenchSettings(**settings, crossovers=0))["crossovers"]]  # type: ignore[arg-type]
    assert texts[0] == (
        "from some length between T = 128 and 512 until some length between T = 512 and 2,048, rwkv7 trains faster "
        "than mamba on this machine (not narrowed down)"
    )


def test_the_first_length_is_found_wherever_it_is() -> None:
    lengths = [*range(192, 1000, 64), 1000]
    for place in range(150, 1050, 7):
        expected = next((length for length in lengths if length >= place), None)
        assert first_length(150, 1000, lambda length, at=place: length >= at) == expected
    assert first_length(64, 65, lambda length: True) == 65


# The command.


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["zoo bench", *words])
    return run_cli(bench_command.main)


def test_the_command_writes_what_it_found(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(machine, "PRODUCT", {"cpu": 64})
    monkeypatch.setattr(machine, "COPIED", {"cpu": 2**16})
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    words = ["arch=mamba", "mamba.d_state=4", "n_layers=1", "d_model=24", "lengths=[16,32]", "batch_tokens=32"]
    kinds = ("train", "decode")
    assert run(monkeypatch, *words, "kinds=train,decode", "repeats=2", f"out={out}", f"plot={plot}") == 0
    printed = capsys.readouterr()
    found = json.loads(out.read_text())
    assert [(row["kind"], row["length"], row["batch"]) for row in found["rows"]] == [
        (kind, length, 1 if kind == "decode" else 32 // length) for kind in kinds for length in (16, 32)
    ]
    for row in found["rows"]:
        assert row.keys() >= ROW
        assert (row["status"], row["label"], row["seconds"]["repeats"]) == ("ok", "mamba", 2)
        assert row["backends"]["selective_scan"]
    assert found["rows"][-1]["state_bytes"] == 4 * (48 * 4 + 48 * 3) + 16  # scan, convolution, two numbers of the shell
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["reaches"]["matmul_gflops"] > 0
    assert "mamba: decoding step after 1 x 32 tokens: " in printed.err
    assert "Training step" in printed.out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_of_little_or_nothing(fake, suffix: str, tmp_path) -> None:
    fake.curves = {0: lambda T: (1e-3 if T < 600 else None, 1e9), 1: lambda T: (None, 0)}
    rows = bench([("a", 0), ("b", 1)], BenchSettings(lengths=[512, 2048]))["rows"]  # type: ignore[list-item]
    overtaken = {"kind": "train", "quantity": "time", "measured": True, "from_length": 1024}
    draw(rows, [overtaken], tmp_path / f"some.{suffix}")
    draw(rows[len(rows) // 2 :], [], tmp_path / f"none.{suffix}")
    assert all((tmp_path / f"{name}.{suffix}").stat().st_size > 1000 for name in ("some", "none"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["arch=mambo"], "no architecture 'mambo': did you mean 'mamba'"),
        (["arch=[]"], "there is nothing to measure"),
        (["kinds=trian"], "kinds=['trian'] is not valid: did you mean 'train'"),
        (["lengths=0,8"], "lengths=[0, 8] is not valid: expected at least one length"),
        (["lengths=long"], "expected a list (each item an integer)"),
        (["arch=mamba", "rwkv4.d_model=8"], "'rwkv4.d_model=8' sets none of the measured architectures"),
        (["arch=mamba", "mamba.d_stat=8"], "architecture 'mamba' has no setting 'd_stat': did you mean 'd_state'"),
        (["arch=mamba,mamba2", "d_model=0"], "d_model=0 is not valid"),
        (["models=nowhere/run"], "nowhere/run"),
        (["device=tpu"], "device='tpu' cannot be used here"),
        (["out=/nowhere/bench.json"], "there is no such folder"),
        (["repeat=3"], "zoo bench has no setting 'repeat': did you mean 'repeats'"),
        (["kernels", "operators=sdd"], "operators=['sdd'] is not valid: did you mean 'ssd'"),
        (["kernels", "rounds=0"], "rounds=0 is not valid"),
    ],
)
def test_bad_input_is_one_line(words: list[str], expected: str, monkeypatch, capsys) -> None:
    assert run(monkeypatch, *words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_models_are_measured_by_the_name_of_their_folder(tmp_path) -> None:
    folder = tmp_path / "my-run"
    zoo.save_pretrained(create_model("mamba", **TINY), folder)
    config = bench_command.BenchConfig(models=[str(folder)])
    ((label, make),) = bench_command.contestants(config)
    assert (label, make().architecture) == ("my-run", "mamba")


def test_help_names_every_setting(monkeypatch, capsys) -> None:
    for words, expected in ((["--help"], bench_command.BenchConfig), (["kernels", "-h"], kernels_bench.KernelSettings)):
        assert run(monkeypatch, *words) == 0
        printed = capsys.readouterr().out
        assert all(name in printed for name in expected.__dataclass_fields__)


# Operators.


def test_every_operator_has_a_case() -> None:
    assert {operator for operator, _ in CASES.values()} == {operator.name for operator in backends.operators()}


def test_operators_are_timed_against_the_reference_and_peers() -> None:
    settings = kernels_bench.KernelSettings(operators=["token_shift", "selective_scan"], lengths=[8], rounds=2)
    rows = {(row["operator"], row["contender"]): row for row in kernels_bench.bench_kernels(settings)}
    assert {"numba", "reference", "mambapy pscan"} <= {who for operator, who in rows if operator == "selective_scan"}
    for row in rows.values():
        assert row["status"] == "ok", row["reason"]
        assert row["error"] < 1e-5
        assert row["forward"]["repeats"] == row["forward_backward"]["repeats"] == 2
    scan = rows["selective_scan", "numba"]["forward_backward"]["median"]
    for who, ratio in (("reference", "over_reference"), ("mambapy pscan", "over_peer")):
        other = rows["selective_scan", who]["forward_backward"]["median"]
        assert rows["selective_scan", "numba"][ratio] == pytest.approx(other / scan)
    assert rows["token_shift", "numba"]["over_peer"] is None


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, make = CASES["token_shift"]

    def wrong(draw, batch, length) -> Case:
        case = make(draw, batch, length)
        return Case(case.inputs, case.call, {"liar": ("torch", lambda x: 1.001 * case.call(x, "torch"))})

    monkeypatch.setitem(CASES, "token_shift", (operator, wrong))
    settings = kernels_bench.KernelSettings(operators=["token_shift"], lengths=[8], rounds=1)
    rows = {row["contender"]: row for row in kernels_bench.bench_kernels(settings)}
    assert rows["torch"]["status"] == "ok"
    assert rows["liar"]["status"] == "failed"
    assert "differs from the reference by 1" in rows["liar"]["reason"]
    assert "forward" not in rows["liar"]


def test_a_slow_contender_is_left_out_of_longer_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_bench, "PATIENCE", 0)
    settings = kernels_bench.KernelSettings(operators=["token_shift"], lengths=[8, 16, 32], rounds=1)
    rows = [row for row in kernels_bench.bench_kernels(settings) if row["contender"] == "reference"]
    assert [row["status"] for row in rows] == ["ok", "too_slow", "too_slow"]
    assert "would take" in rows[2]["reason"]
