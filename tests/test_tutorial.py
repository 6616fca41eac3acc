"""docs/adding-an-architecture.md, followed to the letter in a copy of the project."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tutorial_takes_one_file(tmp_path) -> None:
    page = (ROOT / "docs" / "adding-an-architecture.md").read_text(encoding="utf-8")
    for folder in ("zoo", "kernels", "train", "eval", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    target = re.search(r"Save this as `(.+?)`", page).group(1)
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / target).write_text(code, encoding="utf-8")

    (block,) = re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
    for command in block.strip().splitlines():
        program, *arguments = command.split()
        module = {"pytest": ["-m", "pytest", "-q"], "python": [], "zoo": ["-m", "zoo"]}[program]
        result = subprocess.run(
            [sys.executable, *module, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        if program == "pytest":
            passed = re.search(r"(\d+) passed", result.stdout)
            assert passed, result.stdout
            assert int(passed.group(1)) >= 20
        if program == "zoo":
            assert "moving_average" in result.stdout
    assert list((tmp_path / "runs").glob("moving_average-*/summary.json"))
