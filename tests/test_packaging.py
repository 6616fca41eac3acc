"""The wheel and the sdist install, and run outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import zoo, zoo.kernels, zoo.train.run, zoo.eval.measure, torch
model = zoo.create_model("mamba", vocab_size=5, d_model=8)
assert zoo.generate(model, torch.zeros(1, 1, dtype=torch.int64), max_new_tokens=2).shape == (1, 3)
assert zoo.load_pretrained("mamba-mqar-nano").architecture == "mamba"
print(zoo.__file__)
"""


def run(*command: str, **kwargs) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT))
    return folder


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_installs_and_runs_elsewhere(dist: Path, pattern: str, tmp_path: Path) -> None:
    (archive,) = dist.glob(pattern)
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--target", str(site), str(archive))
    names = {path.name for path in site.iterdir()} - {"bin"}
    assert {name for name in names if not name.endswith(".dist-info")} == {"zoo"}
    where = run(sys.executable, "-c", USE, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)})
    assert where.strip() == str(site / "zoo" / "__init__.py")


def test_wheel_holds_every_source_once(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    packed = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    folders = {"zoo": "zoo", "kernels": "zoo/kernels", "train": "zoo/train", "eval": "zoo/eval"}
    sources = [
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in folders.items()
        for path in (ROOT / folder).rglob("*.py")
        if not any(part in ("kernels", "train", "eval") for part in path.relative_to(ROOT / folder).parts[:1])
        or folder != "zoo"
    ]
    assert sorted(packed) == sorted(sources)
