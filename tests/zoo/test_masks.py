"""Pictures of masks: what is drawn is what the definitions say, and the page of them is made by its own commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo.console import run_cli
from zoo.masks import MasksConfig, main, sights
from zoo.sight import GLOBAL_KEY, GLOBAL_QUERY, NEAR, RANDOM, REPEATED, UNSEEN, Sight

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "masks.md").read_text(encoding="utf-8")


def see(arch: str, *words: str, **settings: object) -> list[Sight]:
    return sights(MasksConfig(arch=arch, **settings), words)


def places(documents: list[int]) -> list[tuple[int, int, int]]:
    """Of each token: document, place in it, and the document's size."""
    return [(i, place, size) for i, size in enumerate(documents) for place in range(size)]


@pytest.mark.parametrize("documents", [[37], [3, 19, 15]])
@pytest.mark.parametrize("causal", [True, False])
def test_longformer_is_as_defined(causal: bool, documents: list[int]) -> None:
    words = [f"causal={str(causal).lower()}", "window=3", "n_global=2", "dilation=3", "dilated_heads=2", "n_kv_heads=2"]
    (sight,) = see("longformer", *words, documents=documents if len(documents) > 1 else None, length=sum(documents))
    tokens = places(documents)
    for head in range(4):
        dilation = 3 if head >= 2 else 1
        for i, (of_query, query, _) in enumerate(tokens):
            for j, (of_key, key, _) in enumerate(tokens):
                distance = query - key
                expected = UNSEEN
                if abs(distance) <= 3 * dilation and distance % dilation == 0:
                    expected = NEAR
                if key < 2:
                    expected = GLOBAL_KEY
                if query < 2 and not causal:
                    expected = GLOBAL_QUERY
                if of_query != of_key or (causal and distance < 0):
                    expected = UNSEEN
                assert sight.kinds[head, i, j] == expected, (head, i, j)
    assert torch.equal(sight.weights, (sight.kinds != UNSEEN).float())
    assert sight.distinct_heads() == [[0, 1], [2, 3]]
    assert sight.kept == (9 + 2 if causal else None)


@pytest.mark.parametrize("documents", [[50], [50, 21]])
@pytest.mark.parametrize("causal", [True, False])
def test_bigbird_is_as_defined(causal: bool, documents: list[int]) -> None:
    block, n_random, side = 4, 2, 2 if causal else 1
    words = [f"causal={str(causal).lower()}", f"block_size={block}", f"n_random_blocks={n_random}", "n_heads=2"]
    (sight,) = see("bigbird", *words, documents=documents if len(documents) > 1 else None, length=sum(documents))
    tokens = places(documents)
    for head in range(2):
        for i, (of_query, query, size) in enumerate(tokens):
            last, row = (size - 1) // block, query // block
            drawn, open_to_chance = set(), set()
            for j, (of_key, key, _) in enumerate(tokens):
                column = key // block
                kind = int(sight.kinds[head, i, j])
                if of_query != of_key or (causal and key > query):
                    assert kind == UNSEEN
                elif not causal and row in (0, last):
                    assert kind == GLOBAL_QUERY
                elif column == 0 or (not causal and column == last):
                    assert kind == GLOBAL_KEY
                elif abs(row - column) <= side:
                    assert kind == NEAR
                else:
                    open_to_chance.add(column)
                    assert kind in (UNSEEN, RANDOM)
                    if kind == RANDOM:
                        drawn.add(column)
            assert len(drawn) == min(n_random, len(open_to_chance)), (head, i)
    assert len(sight.distinct_heads()) == 2
    assert sight.kept is None or sight.kept <= sum(documents)


def test_repeated_keys_and_training_of_the_plan_of_transformers() -> None:
    words = ["plan=transformers", "causal=false", "max_positions=64", "block_size=4", "n_random_blocks=2"]
    (evaluation,) = see("bigbird", *words, length=48)
    assert bool((evaluation.weights[:, 4:-4, :4] == 3).all())
    assert bool((evaluation.kinds[:, 4:-4, :4] == REPEATED).all())
    assert int((evaluation.kinds == RANDOM).sum()) == 0
    (training,) = see("bigbird", *words, length=48, training=True)
    assert int((training.kinds == RANDOM).sum()) > 0
    (short,) = see("bigbird", *words, length=36)  # of 9 blocks, up to which it sees everything
    assert short.share(0) == 1
    assert int((short.kinds == RANDOM).sum()) == 0


def test_transformer_and_layers() -> None:
    causal, both = (see("transformer", f"causal={word}", length=9)[0] for word in ("true", "false"))
    assert torch.equal(causal.weights[0], torch.ones(9, 9).tril())
    assert causal.is_full()
    assert causal.kept == 9
    assert bool((both.weights == 1).all())
    (window,) = see("transformer", "window=4", length=9)
    assert torch.equal(window.weights[0], torch.ones(9, 9).tril().triu(-3))
    assert (window.is_full(), window.kept, window.reach(0)) == (False, 3, (3, 0))
    growing = see("longformer", "n_layers=3", "window=1", "window_growth=2", length=20, layer="all")
    assert [(sight.layer, sight.reach(0)[0], sight.kept) for sight in growing] == [(0, 1, 1), (1, 2, 2), (2, 4, 4)]
    (in_hybrid,) = see("hybrid", 'pattern=["mamba","longformer"]', 'members={"longformer":{"window":2}}', length=9)
    assert (in_hybrid.layer, in_hybrid.reach(0)) == (1, (2, 0))


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["zoo masks", *words])
    return run_cli(main)


def test_every_command_of_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    commands = re.findall(r"^python -m zoo\.masks (.+)$", PAGE, flags=re.MULTILINE)
    assert len(commands) >= 9
    for command in commands:
        assert run(monkeypatch, *command.split()) == 0, command
    shown = {f"docs/{link}" for link in re.findall(r"!\[.+?\]\((.+?)\)", PAGE)}
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert shown == written - {"mask.png"}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "images").glob("*")} >= shown
    for path in written:
        assert (tmp_path / path).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / path).stat().st_size < 60_000


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_other_formats(suffix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / f"mask.{suffix}"
    assert run(monkeypatch, "arch=longformer", "arch.window=2", "n_heads=12", "length=8", f"out={out}") == 0
    assert out.stat().st_size > 1_000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "needs arch"),
        (["arch=longformr"], "did you mean 'longformer'"),
        (["arch=mamba"], "mamba has no mask over its tokens: draw one of bigbird, longformer, transformer"),
        (["arch=landmark"], "landmark has no mask over its tokens: draw one of bigbird, longformer, transformer"),
        (["arch=longformer", "windw=3"], "did you mean 'window'"),
        (["arch=longformer", "window=0"], "window=0 is not valid: expected at least 1"),
        (["arch=longformer", "layer=2"], "layer=2 is not valid: expected 0 to n_layers - 1 = 1, or all"),
        (["arch=longformer", "layer=some"], "expected a number, or all"),
        (["arch=hybrid", "layer=0"], "layer=0 is not valid: expected one that attends: 2, or all"),
        (["arch=longformer", "length=0"], "length=0 is not valid: expected at least 1"),
        (["arch=longformer", "length=1000"], "expected at most 512"),
        (["arch=longformer", "length=64", "documents=20,45"], "expected lengths that add up to length=64"),
        (["arch=longformer", "documents=500,13"], "at most 512 in all"),
        (["arch=longformer", "documents=20,x"], "documents=[20, 'x'] is not valid: expected a list"),
        (["arch=longformer", "length=9", "max_positions=8"], "expected at most max_positions=8"),
        (["arch=bigbird", "plan=transformers", "causal=false", "max_positions=64", "documents=9,9"], "no segment_ids"),
        (["arch=longformer", "out=mask.gif"], "expected a name that ends in .png or .svg or .pdf"),
        (["arch=longformer", "out=/nowhere/mask.png"], "expected a folder that exists"),
        (["arch=longformer", "window"], "'window' is not an argument"),
    ],
)
def test_bad_input_is_one_line(words: list[str], expected: str, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(monkeypatch, "arch=longformer", f"out={tmp_path}/mask.png") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "matplotlib is not installed (pip install 'subquadratic-zoo[plots]')" in line


def test_the_door(tmp_path: Path) -> None:
    out = tmp_path / "mask.png"
    command = [sys.executable, "-m", "zoo", "masks", "arch=longformer", "length=12", "window=2", f"out={out}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"wrote {out}\n", "")
    assert out.exists()
