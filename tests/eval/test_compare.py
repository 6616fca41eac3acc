"""A comparison from words to table, and what may happen to it on the way."""

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from zoo.eval.compare import cells as cells_module
from zoo.eval.compare import command as compare_module
from zoo.eval.compare import results
from zoo.eval.compare.cells import Cell, Outcome, outcome, run_folder
from zoo.eval.compare.command import compare
from zoo.eval.compare.config import read_words
from zoo.eval.compare.plan import data_facts, describe, make_plan
from zoo.eval.compare.sweeps import sweep_cells
from zoo.kernels.errors import ConfigError, DataError
from zoo.train.config import train_config
from zoo.train.data import create_source
from zoo.train.errors import RunError
from zoo.train.folder import RunFolder

DATA = ["data.seq_len=32", "data.num_examples=256", "data.validation_examples=32", "data.test_examples=32"]
TINY = [
    *(f"arch.{name}.{key}" for name in ("transformer", "rwkv4") for key in ("d_model=16", "n_layers=1")),
    "match=none", "trainer.accelerator=cpu", "trainer.max_steps=16", "trainer.val_every=2", "bench=false",
]  # fmt: skip
WORDS = ["arch=[transformer,rwkv4,mamba]", *DATA, *TINY, "arch.mamba.backend=triton", "lrs=[1e-3,3e-3]", "seeds=[3]"]
TIMES = ("wall_seconds", "tokens_per_second", "peak_memory_bytes")


def run(folder: Path, *words: str) -> Path:
    config, others = read_words([*words, f"folder={folder}", "name=x"])
    compare(config, others, Console(quiet=True))
    return folder / "x"


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


@pytest.fixture(autouse=True)
def _no_report(request, monkeypatch):
    if request.function is not test_a_finished_comparison_writes_its_report_again_and_measures:
        monkeypatch.setattr(compare_module.report, "write", lambda folder: folder / "report.html")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A comparison that nothing happened to, with an architecture that cannot run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_module.report, "write", lambda folder: folder / "report.html")
        return run(tmp_path_factory.mktemp("comparison"), *WORDS)


@pytest.fixture
def copied(undisturbed, tmp_path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "x"))


def test_every_cell_is_a_row_and_a_failure_has_its_reason(undisturbed):
    rows = table(undisturbed)
    assert [(row["label"], row["lr"], row["seed"]) for row in rows] == [
        (name, lr, "3") for name in ("transformer", "rwkv4", "mamba") for lr in ("0.001", "0.003")
    ]
    assert [row["status"] for row in rows] == 4 * ["finished"] + 2 * ["failed"]
    assert all("backend 'triton' cannot run this" in row["reason"] for row in rows[4:])
    assert len({row["batch_hash"] for row in rows[:4]}) == 1
    for row in rows[:4]:
        summary = RunFolder(undisturbed / row["run"]).read_summary()
        assert float(row["val_acc"]) == summary["metrics"]["val"]["acc"]
        assert float(row["test_acc/num_pairs=4"]) == summary["metrics"]["test"]["acc/num_pairs=4"]
        assert row["batch_hash"] == summary["batch_hash"]
        assert (row["steps"], row["params"]) == ("16", str(summary["params"]))
    assert [row["chosen"] for row in rows].count("true") == 3


def test_comparison_json_tells_what_the_report_needs(undisturbed):
    told = json.loads((undisturbed / "comparison.json").read_text())
    assert (told["seeds"], told["lrs"], told["metric"]) == (
        [3],
        [1e-3, 3e-3],
        {"name": "acc", "higher_is_better": True},
    )
    assert told["data"]["length"] == 32
    assert told["data"]["levels"]["plateau"] == 0.25
    assert told["data"]["lengths"] == {"train": [32], "validation": [32], "test": [32]}
    assert told["finished"] >= told["started"]
    assert 0 < told["hours"] < 1
    transformer = told["architectures"][0]
    assert transformer["state_bytes"]["32"] == 4 * 32 * 2 * 16 + 4 * 8, "keys and values, and four counters"
    assert transformer["params"] == int(table(undisturbed)[0]["params"])


def test_levels_of_each_length_are_told():
    """On `word` the first two products take no state: two of 4 labels, or two of 8."""
    facts = data_facts(
        create_source(train_config(["data=word", "data.test_lengths=[4,8]", "data.test_examples=8"]).data), 8
    )
    chance = facts["levels"]["chance"]
    plateaus = {length: levels["plateau"] for length, levels in facts["levels_by_length"].items()}
    assert plateaus == pytest.approx({"4": (2 + 2 * chance) / 4, "8": (2 + 6 * chance) / 8})
    assert facts["levels"]["plateau"] == pytest.approx((4 + 8 * chance) / 12)
    assert facts["lengths"] == {"test": [4, 8]}


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_and_started_again_it_gives_the_same_table(undisturbed, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "zoo.compare", *WORDS, f"folder={tmp_path}", "name=x", "jobs=1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    first = run_folder(tmp_path / "x", Cell("transformer", "transformer", 1e-3, 3, ()))
    while first.newest_checkpoint() is None:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.005)
    process.kill()
    process.wait()
    process.stderr.close()
    lock = FileLock(tmp_path / "x" / "logs" / f"{first.path.name}.lock")
    with lock.acquire(timeout=60):  # the run that is left alone ends by itself, and saves
        summary = first.read_summary()
    assert summary is None or summary["status"] == "interrupted"
    assert [row["status"] for row in table(tmp_path / "x")] == 6 * ["missing"]
    (first.path.parent / "rwkv4-lr0.003-s3").mkdir()  # killed before its settings were written
    assert table(run(tmp_path, *WORDS)) == table(undisturbed)


def test_interrupted_it_writes_what_is_known_and_goes_on(undisturbed, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compare_module._Progress, "ended", interrupt)
        with pytest.raises(KeyboardInterrupt, match="interrupted: 1 of 6 runs are finished; the same command goes on"):
            run(tmp_path, *WORDS, "jobs=1")
    assert [row["status"] for row in table(tmp_path / "x")] == ["finished"] + 5 * ["missing"]
    before = (tmp_path / "x/runs/transformer-lr0.001-s3/summary.json").stat().st_mtime_ns
    run(tmp_path, *WORDS, "jobs=2")
    assert table(tmp_path / "x") == table(undisturbed)
    assert (tmp_path / "x/runs/transformer-lr0.001-s3/summary.json").stat().st_mtime_ns == before


def test_hydras_launcher_trains_the_same_cells(undisturbed, tmp_path):
    words = [word for word in WORDS if not word.startswith(("arch=", "arch.mamba"))]
    config, others = read_words([*words, "arch=[rwkv4]", f"folder={tmp_path}"])
    plan = make_plan(config, others)
    ended: dict[Cell, Outcome] = {}
    sweep_cells(plan.cells, tmp_path, launcher="basic", jobs=1, threads=1, ended=ended.__setitem__)
    assert ended == dict.fromkeys(plan.cells, Outcome("finished"))
    ours = [results.cell_row(tmp_path, cell, ended[cell], "acc") for cell in plan.cells]
    theirs = [row for row in table(undisturbed) if row["label"] == "rwkv4"]
    assert [str(row["test_acc"]) for row in ours] == [row["test_acc"] for row in theirs]
    assert [row["run"] for row in ours] == [row["run"] for row in theirs]


def test_trained_models_are_evaluated_on_their_test_data(undisturbed, tmp_path):
    rows = table(undisturbed)
    models = [str(undisturbed / row["run"]) for row in (rows[0], rows[2])]
    found = table(run(tmp_path, f"models=[{','.join(models)}]", "bench=false"))
    for row, before in zip(found, (rows[0], rows[2]), strict=True):
        assert row["label"] == Path(before["run"]).name
        assert (row["status"], row["chosen"], row["lr"]) == ("finished", "true", "")
        assert float(row["test_acc"]) == pytest.approx(float(before["test_acc"]), abs=1e-9)
        assert row["batch_hash"] == before["batch_hash"]
    with pytest.raises(ConfigError, match="takes one of the two"):
        read_words(["arch=mamba", f"models={models[0]}"])


def test_a_finished_comparison_writes_its_report_again_and_measures(copied, monkeypatch, capsys):
    asked = []

    def bench(models, settings, say):
        asked.append(([label for label, _ in models], settings.lengths))
        assert models[0][1]().config.d_model == 16
        rows = [
            {"label": label, "kind": "train", "length": n, "status": "failed"}
            for n in settings.lengths
            for label, _ in models
        ]
        return {"machine": {}, "reaches": {}, "rows": rows, "crossovers": []}

    monkeypatch.setattr(compare_module, "bench", bench)
    words = [word for word in WORDS if not word.startswith(("bench", "arch.mamba", "arch="))]
    lighter = ["arch=[transformer,rwkv4]", *words, f"folder={copied.parent}", "name=y", "lengths=[64]"]
    config, others = read_words(lighter)
    for cell in make_plan(config, others).cells:  # nothing is left to train
        shutil.copytree(run_folder(copied, cell).path, run_folder(copied.parent / "y", cell).path)
    (copied.parent / "y" / "comparison.json").write_text(json.dumps(describe(make_plan(config, others))))
    for _ in range(2):
        page = compare(config, others, Console())
    assert asked == [(["transformer", "rwkv4"], [64])], "measured once"
    assert "rwkv4" in page.read_text()
    assert f"report: {page}" in capsys.readouterr().out


def test_another_configuration_is_refused_and_named(copied):
    words = [word for word in WORDS if not word.startswith("lrs")]
    with pytest.raises(ConfigError, match=r"of other settings \(lrs: \[0.001, 0.003\] there, \[0.01\] now.*name="):
        run(copied.parent, *words, "lrs=[0.01]")
    with pytest.raises(ConfigError, match=r"rwkv4.d_ff: None there, 48 now"):
        run(copied.parent, *WORDS, "arch.rwkv4.d_ff=48")
    with pytest.raises(ConfigError, match=r"data.data_seed: 123 there, 5 now"):
        run(copied.parent, *WORDS, "data.data_seed=5")


def test_other_batches_are_refused(copied):
    summary = json.loads((copied / "runs/rwkv4-lr0.003-s3/summary.json").read_text())
    summary["batch_hash_after"]["8"] = "0" * 64
    (copied / "runs/rwkv4-lr0.003-s3/summary.json").write_text(json.dumps(summary))
    with pytest.raises(DataError, match=r"transformer-lr0.001-s3 and rwkv4-lr0.003-s3, both of seed 3, were not"):
        run(copied.parent, *WORDS)


def test_one_process_at_a_time(copied):
    with FileLock(copied / ".lock"), pytest.raises(ConfigError, match=r"another comparison is writing into .*name="):
        run(copied.parent, *WORDS)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "holiday.jpg").touch()
    with pytest.raises(ConfigError, match=r"holds holiday.jpg, and no comparison"):
        run(tmp_path, *WORDS)
    (tmp_path / "x" / "comparison.json").write_text("{")
    with pytest.raises(ConfigError, match=r"comparison.json is damaged: restore it"):
        run(tmp_path, *WORDS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is always full")
def test_a_full_disk_is_one_line(copied):
    (copied / "results.csv.part").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"the disk is full .*make room, then the same command goes on"):
        run(copied.parent, *WORDS)
    assert len(table(copied)) == 6


def test_a_full_disk_in_a_run_ends_all(tmp_path, monkeypatch):
    def train_cells(cells, *_, ended, **__):
        ended(cells[0], Outcome("failed", "the disk is full after step 3 (runs): make room"))

    monkeypatch.setattr(compare_module, "train_cells", train_cells)
    with pytest.raises(RunError, match=r"the disk is full \(.*x\): make room, then the same command goes on"):
        run(tmp_path, *WORDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["arch=[mamba,transfromer]"], "no architecture 'transfromer': did you mean 'transformer'"),
        (["data=mqra"], "no dataset|no data 'mqra': did you mean 'mqar'"),
        (["arch=mamba", "arch.mamba.d_stat=3"], "arch has no setting 'd_stat': did you mean 'd_state'"),
        (["arch=mamba", "arch.rwkv4.d_ff=8"], r"arch.rwkv4.* sets an architecture that is not compared"),
        (["arch=mamba", "arch.d_state=8"], r"'arch.d_state=8': whose setting\? Write arch.NAME.d_state=8"),
        (["arch=mamba", "match=params", "budget=10"], "a budget of 10 parameters cannot be reached by mamba"),
        (["arch=mamba", "objective=masked", "arch.mamba.causal=true"], "mamba: arch.causal=true sees one side only"),
        (["arch=mamba", "optim.lr=1e-3"], r"'optim.lr=1e-3': learning rates are compared, so give them as lrs="),
        (["arch=mamba,mamba"], "expected at least one, and none twice"),
        (["seeds=0"], r"seeds=.* is not valid: expected how many, or which"),
        (["seeds=[0,-1]"], r"seeds=.* is not valid: expected how many, or which"),
        (["trainer=debgu"], "did you mean 'debug'"),
        (["match=none", "budget=100"], "expected match=params, flops or state beside it"),
        (["seed=1"], "zoo compare has no setting 'seed': did you mean 'seeds'"),
        (["dta.x=1"], "did you mean 'data'"),
        (["lrs=[-1]"], "expected numbers above 0"),
    ],
)
def test_bad_words_are_one_line(words, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_plan(*read_words([*DATA, *words]))
    assert "\n" not in str(caught.value)


def test_sizes_and_learning_rates_are_decided_before_anything_runs():
    plan = make_plan(*read_words([*DATA, "arch=[mamba,rwkv4]", "seeds=3", "arch.transformer.d_model=64"]))
    mamba, rwkv4 = plan.contestants
    assert mamba.match.target == rwkv4.match.target, "the budget is that of the baseline, as it is set"
    assert 50_000 < mamba.match.target < 150_000
    assert mamba.match.matches
    assert rwkv4.match.matches
    assert mamba.lrs == [0.001, 0.002, 0.004]
    assert rwkv4.lrs == [0.0025, 0.005, 0.01], "2.5 times the rate, as its file says"
    assert (plan.base.trainer.max_steps, plan.base.trainer.val_every) == (3000, 150), "0.6 of those for a single run"
    assert describe(plan)["lrs"] == [], "they are not the same for all"
    assert [cell.seed for cell in plan.cells[:3]] == [0, 1, 2]
    assert f"arch.d_model={mamba.settings['d_model']}" in mamba.words
    assert mamba.size.params == mamba.match.reached


def row(label, lr, seed, value, status="finished"):
    return {"label": label, "lr": lr, "seed": seed, "status": status, "val_x": value}


def chosen(rows, higher=True):
    results.choose(rows, "x", higher_is_better=higher)
    return {row["lr"] for row in rows if row["chosen"]}


def test_the_median_over_seeds_picks_the_learning_rate():
    one = [row("a", 1.0, seed, value) for seed, value in enumerate((0.9, 0.1, 0.2))]
    two = [row("a", 2.0, seed, value) for seed, value in enumerate((0.3, 0.4, 0.0))]
    assert chosen([*one, *two]) == {2.0}
    assert chosen([*one, *two], higher=False) == {1.0}
    assert chosen([row("a", 2.0, 0, 0.5), row("a", 1.0, 0, 0.5)]) == {1.0}, "of equal ones the smaller"
    assert chosen([row("a", 1.0, 0, None, "failed"), row("a", 2.0, 0, 0.0)]) == {2.0}
    assert chosen([row("a", 1.0, 0, None, "failed"), row("a", 2.0, 0, 9.0)], higher=False) == {2.0}
    assert chosen([row("a", 1.0, 0, None, "missing")]) == set()
    assert chosen([row("a", 1.0, 0, 1.0), row("b", 2.0, 0, 0.0)]) == {1.0, 2.0}, "each for itself"


def test_runs_of_different_lengths_share_their_beginning():
    short = {"tokens": 30, "batch_hash": "c", "batch_hash_after": {"1": "a", "2": "b"}}
    long = {"tokens": 50, "batch_hash": "e", "batch_hash_after": {"1": "a", "2": "b", "4": "d"}}
    results.check_batches([("short", 0, short), ("long", 0, long), ("other", 1, {**long, "batch_hash": "f"})])
    for changed in ({"batch_hash": "x"}, {"batch_hash_after": {"1": "a", "2": "x"}}):
        with pytest.raises(DataError, match="long and again, both of seed 0, were not trained on the same batches"):
            results.check_batches([("long", 0, long), ("again", 0, long | changed)])


@pytest.mark.parametrize(
    ("exitcode", "summary", "log", "expected"),
    [
        (-9, None, "", Outcome("out_of_memory", "killed by the system, as it does where memory runs out")),
        (-11, None, "", Outcome("failed", "ended by SIGSEGV")),
        (-15, None, "", Outcome("interrupted")),
        (130, {"status": "interrupted"}, "", Outcome("interrupted")),
        (1, {"status": "failed", "error": "out of memory: x"}, "", Outcome("out_of_memory", "out of memory: x")),
        (1, {"status": "failed", "error": "not finite"}, "error: other", Outcome("failed", "not finite")),
        (2, None, "step 1\nerror: no such file\n\n", Outcome("failed", "no such file")),
        (2, {"status": "interrupted"}, "error: no such file", Outcome("failed", "no such file")),
        (0, None, "", Outcome("failed", "ended with status 0")),
    ],
)  # fmt: skip
def test_how_a_cell_ended(exitcode, summary, log, expected, tmp_path):
    cell = Cell("a", "mamba", 1e-3, 0, ())
    run_folder(tmp_path, cell).path.mkdir(parents=True)
    if summary is not None:
        run_folder(tmp_path, cell).write_summary(summary)
    path = cells_module.log_file(tmp_path, cell.name)
    path.parent.mkdir()
    path.write_text(log)
    assert outcome(tmp_path, cell, exitcode) == expected
