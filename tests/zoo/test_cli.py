"""The door: verbs, tables, generation from the command line, and one-line errors."""

import csv
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import zoo
import zoo.cli


def command(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


@pytest.fixture
def here(monkeypatch, capsys):
    """The door in this process, which spares a new one its imports."""

    def run(*words: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["zoo", *words])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            zoo.cli.main()
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(words, ended.value.code or 0, shown.out, shown.err)

    return run


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
    assert all(verb in shown.stdout for verb in ("train", "list", "generate", "score", "kernels"))
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


def test_generate_refuses_in_one_line(text_model, tmp_path, here) -> None:
    assert_one_line(here("generate", "model=/nowhere"), "no folder '/nowhere'")
    assert_one_line(here("generate"), "needs model")
    model = f"model={text_model}"
    assert_one_line(here("generate", model, "temprature=1"), "did you mean 'temperature'")
    assert_one_line(here("generate", model, "temperature=-1"), "temperature=-1", "at least 0")
    assert_one_line(here("generate", model, "device=cuda:9"), "device='cuda:9'", "device=cpu")
    assert_one_line(here("generate", model, "device=meta"), "device='meta'", "device=cpu")
    assert_one_line(here("generate", model, "prompt="), "prompt= is empty")
    assert_one_line(here("generate", model, 'stop=["a", ""]'), "stop=", "texts that are not empty")
    assert_one_line(here("generate", model, "seed=99999999999999999999999"), "expected at most 92233")
    zoo.save_pretrained(zoo.create_model("mamba", vocab_size=5, d_model=8), tmp_path)
    assert_one_line(here("generate", f"model={tmp_path}"), "not trained on text")


def test_generate_ends_before_a_stop_text(text_model, here) -> None:
    words = ["generate", f"model={text_model}", "prompt=5", "max_new_tokens=60", "seed=3"]
    free = here(*words).stdout
    stop = free[9:11]
    for given in (stop, json.dumps(["no such text", stop])):
        assert here(*words, f"stop={given}").stdout == "5" + free[1 : free.index(stop, 1)] + "\n"
    assert here(*words, "stop=no such text", "prefill_chunk=1").stdout == free


def cells(shown: str) -> dict[str, str]:
    """The first two columns of all tables."""
    rows = (re.split("[│┃|]", line)[1:3] for line in shown.splitlines() if line[:1] in "│┃|")
    return {name.strip(): value.strip() for name, value in rows}


def test_score(text_model, tmp_path, here) -> None:
    text = "def f(x):\n    return x + 1  # größer\n" * 12
    (tmp_path / "text.py").write_text(text, encoding="utf-8")
    ids = list(text.encode())
    with torch.no_grad():
        logits = zoo.load_pretrained(text_model)(torch.tensor([ids])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    words = ["score", f"model={text_model}", f"text={tmp_path / 'text.py'}", "chunk=100"]
    result = command("zoo.score", *words[1:], f"out={tmp_path / 'scores.csv'}")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    shown = cells(result.stdout)
    nll = -expected.mean().item()
    assert float(shown["nll per token"].split()[0]) == pytest.approx(nll, abs=2e-4)
    assert float(shown["perplexity"].replace(",", "")) == pytest.approx(math.exp(nll), rel=1e-3)
    assert float(shown["bits per byte"]) == pytest.approx(nll / math.log(2), abs=2e-4)
    assert float(shown["128 to 255"]) == pytest.approx(-expected[127:255].mean().item(), abs=2e-4)
    assert list(shown)[-1] == f"256 to {len(ids) - 1}"
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["position"]), int(row["token"])) for row in rows] == list(enumerate(ids))[1:]
    assert [float(row["log_likelihood"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-4)
    np.save(tmp_path / "tokens.npy", np.array([ids, ids], dtype=np.uint8))
    scored = here(*words[:2], f"tokens={tmp_path / 'tokens.npy'}", f"out={tmp_path / 'scores.npy'}")
    assert scored.returncode == 0, scored.stderr
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), np.stack([expected, expected]), atol=1e-4)
    here(*words, "carry=false", "overlap=50", f"out={tmp_path / 'scores.npy'}")
    windows = zoo.score(zoo.load_pretrained(text_model), torch.tensor(ids), chunk=100, overlap=50, carry=False)
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), windows, atol=1e-6)
    assert (windows - expected).abs().max() > 1e-5


def test_score_refuses_in_one_line(text_model, tmp_path, here) -> None:
    model, empty, one = f"model={text_model}", tmp_path / "empty", tmp_path / "one"
    empty.touch()
    one.write_text("a")
    text = f"text={one}"
    assert_one_line(here("score", model), "needs one of the two: text=FILE or tokens=FILE.npy")
    assert_one_line(here("score", model, text, "tokens=a.npy"), "needs one of the two")
    assert_one_line(here("score", model, "text=/nowhere"), "text=/nowhere: cannot be read")
    assert_one_line(here("score", model, f"text={empty}"), "is empty: expected at least two tokens")
    assert_one_line(here("score", model, text), "is one token long")
    assert_one_line(here("score", model, f"tokens={one}"), "cannot be read (no array of numpy)")
    assert_one_line(here("score", model, text, "chunk=0"), "chunk=0 is not valid")
    assert_one_line(here("score", model, text, "out=a.txt"), "ends in .csv or .npy")
    assert_one_line(here("score", model, text, "out=/nowhere/a.csv"), "there is no such folder")
    one.write_text("abc")
    assert_one_line(here("score", model, text, "chunk=9", "overlap=9", "carry=false"), "overlap=9")
    np.save(tmp_path / "large.npy", np.array([3, 256]))
    assert_one_line(here("score", model, f"tokens={tmp_path / 'large.npy'}"), "token id 256 is outside")
    assert_one_line(here("score", model, text, "rope_scaling.factor=8"), "say which one with rope_scaling=")
    assert_one_line(here("score", model, text, "rope_scaling=linear"), "no rotary positions to scale")
    zoo.save_pretrained(zoo.create_model("mamba", vocab_size=5, d_model=8), tmp_path / "other")
    assert_one_line(here("score", f"model={tmp_path / 'other'}", text), "not trained on text")


@pytest.mark.parametrize(
    ("policy", "words", "set_policy"),
    [
        ("rope_scaling", ["linear", "factor=8"], lambda model: zoo.set_rope_scaling(model, "linear", factor=8)),
        ("cache", ["streaming", "sinks=2", "window=20"], lambda m: zoo.set_cache(m, "streaming", sinks=2, window=20)),
    ],
)
def test_policies_follow_the_dot(policy: str, words: list[str], set_policy, tmp_path, here) -> None:
    torch.manual_seed(0)
    model = zoo.create_model("transformer", vocab_size=256, d_model=16)
    zoo.save_pretrained(model, tmp_path, tokenizer={"kind": "bytes"})
    (tmp_path / "text").write_text("0123456789" * 30)
    name, *own = words
    policies = [f"{policy}={name}", *(f"{policy}.{word}" for word in own)]
    common = [f"model={tmp_path}", f"text={tmp_path / 'text'}", f"out={tmp_path / 'scores.npy'}"]
    plain = zoo.score(model, torch.tensor(list(b"0123456789" * 30)))
    set_policy(model)
    expected = zoo.score(model, torch.tensor(list(b"0123456789" * 30)))
    assert here("score", *common, *policies).returncode == 0
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected, atol=1e-6)
    assert (plain - expected).abs().max() > 1e-5
    made = here("generate", common[0], "prompt=0123456789", "max_new_tokens=20", "temperature=0", *policies)
    assert made.stdout.startswith("0123456789")
    assert_one_line(here("score", *common, *policies[1:]), "is a setting of no policy", f"{policy}=...")
    assert_one_line(here("generate", common[0], f"{policy}={name[:-1]}", *policies[1:]), "did you mean", name)
    assert_one_line(here("score", *common, *policies, f"{policy}.other=1"), "other")
    assert_one_line(here("score", *common, *policies, f"{policy}.model=1"), name, "no setting 'model'")


def test_debug_shows_the_traceback() -> None:
    result = command("zoo", "trane", ZOO_DEBUG="1")
    assert result.returncode != 0
    assert "Traceback" in result.stderr
