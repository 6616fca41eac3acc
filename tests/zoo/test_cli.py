"""The door: verbs, tables, generation from the command line, and one-line errors."""

import os
import subprocess
import sys

import pytest

import zoo


def command(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


def assert_one_line(result: subprocess.CompletedProcess, *parts: str) -> None:
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    zoo.save_pretrained(zoo.create_model("mamba", vocab_size=256, d_model=8), folder, tokenizer={"kind": "bytes"})
    return folder


def test_help_and_list() -> None:
    shown = command("zoo", "--help")
    assert shown.returncode == 0
    assert all(verb in shown.stdout for verb in ("train", "list", "generate", "kernels"))
    listed = command("zoo", "list")
    assert listed.returncode == 0, listed.stderr
    assert all(name in listed.stdout for name in zoo.list_models())
    narrow = command("zoo", "list", "rwkv*", COLUMNS="80").stdout
    assert any("rwkv7" in line and line.count(",") >= 4 for line in narrow.splitlines())  # one line of whole figures
    assert_one_line(command("zoo", "list", "nothing*"), "no architecture matches 'nothing*'", "known: ")
    assert_one_line(command("zoo", "trane"), "no verb 'trane'", "did you mean 'train'")


def test_generate(text_model) -> None:
    words = ["zoo", "generate", f"model={text_model}", "prompt=def ", "max_new_tokens=12", "seed=3"]
    first, again = command(*words), command(*words)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def ")
    assert first.stdout == again.stdout
    assert command(*words[:-1], "seed=4").stdout != first.stdout


def test_generate_refuses_in_one_line(text_model, tmp_path) -> None:
    assert_one_line(command("zoo", "generate", "model=/nowhere"), "no folder '/nowhere'")
    assert_one_line(command("zoo", "generate"), "needs model")
    model = f"model={text_model}"
    assert_one_line(command("zoo", "generate", model, "temprature=1"), "did you mean 'temperature'")
    assert_one_line(command("zoo", "generate", model, "temperature=-1"), "temperature=-1", "at least 0")
    assert_one_line(command("zoo", "generate", model, "device=cuda:9"), "device='cuda:9'", "device=cpu")
    assert_one_line(command("zoo", "generate", model, "device=meta"), "device='meta'", "device=cpu")
    assert_one_line(command("zoo", "generate", model, "seed=99999999999999999999999"), "expected at most 92233")
    zoo.save_pretrained(zoo.create_model("mamba", vocab_size=5, d_model=8), tmp_path)
    assert_one_line(command("zoo", "generate", f"model={tmp_path}"), "not trained on text")


def test_debug_shows_the_traceback() -> None:
    result = command("zoo", "trane", ZOO_DEBUG="1")
    assert result.returncode != 0
    assert "Traceback" in result.stderr
