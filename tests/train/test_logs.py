"""metrics.csv, the lines on the terminal, and where a run was made."""

import csv
import io
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

import zoo
from zoo.train import environment
from zoo.train.config import train_config
from zoo.train.logs import MetricsFile
from zoo.train.run import run

from .conftest import TINY


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_on_disk_at_once_and_columns_are_added(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsFile(path)
    log.log_metrics({"a": 1.0}, step=1)
    assert read(path) == [{"step": "1", "a": "1.0"}]
    log.log_metrics({"b": 0.1 + 0.2}, step=2)
    log.log_metrics({"a": float("nan")}, step=3)
    assert read(path) == [
        {"step": "1", "a": "1.0", "b": ""},
        {"step": "2", "a": "", "b": "0.30000000000000004"},
        {"step": "3", "a": "nan", "b": ""},
    ]


def test_a_resumed_run_drops_the_rows_it_makes_again(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsFile(path)
    for step in (1, 2, 3):
        log.log_metrics({"a": step}, step=step)
    with path.open("a") as file:
        file.write("4,")  # cut short by a kill
    log = MetricsFile(path, resumed_step=2)
    log.log_metrics({"a": 30}, step=3)
    assert [(row["step"], row["a"]) for row in read(path)] == [("1", "1.0"), ("2", "2.0"), ("3", "30.0")]


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsFile(path).log_metrics({"a": 1}, step=1)
    MetricsFile(path)
    assert read(path) == []


def printed(tmp_path: Path, *, terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=80)
    run(
        train_config([*TINY, f"runs_dir={tmp_path}", "arch=toy", "trainer.max_steps=4", "trainer.val_every=2"]),
        console=console,
    )
    return text.getvalue()


def test_a_log_file_gets_one_line_per_validation(toy, tmp_path):
    lines = printed(tmp_path, terminal=False).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["2/4", "4/4"]
    assert all("val loss" in line and "val acc" in line for line in lines if line.startswith("step "))
    assert lines[0].endswith(str(tmp_path / "toy-mqar" if (tmp_path / "toy-mqar").exists() else lines[0]))


def test_a_terminal_gets_a_live_line_too(toy, tmp_path):
    assert "\x1b[" in printed(tmp_path, terminal=True)


def test_the_commit_is_that_of_the_checkout(monkeypatch, tmp_path):
    commit = environment.git_commit()
    head = subprocess.run(
        ["git", "-C", str(Path(zoo.__file__).resolve().parent), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    if head.returncode:
        assert commit is None
    else:
        assert commit is not None
        assert commit.removesuffix("-dirty") == head.stdout.strip()


def test_a_copy_inside_another_checkout_has_no_commit(monkeypatch, tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    copy = tmp_path / "site-packages" / "zoo" / "__init__.py"
    copy.parent.mkdir(parents=True)
    copy.write_text("")
    monkeypatch.setattr(zoo, "__file__", str(copy))
    assert environment.git_commit() is None


def test_versions_name_what_can_change_a_result():
    assert {"python", "zoo", "torch", "lightning", "numpy", "numba"} <= environment.versions().keys()


@pytest.mark.parametrize("terminal", [False, True])
def test_the_table_stands_at_the_end(terminal, toy, tmp_path):
    text = printed(tmp_path, terminal=terminal)
    for word in ("test accuracy", "parameters", "peak memory", "device", "kernels", "folder", "next"):
        assert word in text
