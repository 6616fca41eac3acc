"""The layout: imports run one way, importing is light, and the wheel claims no generic name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A package may import those to its left, and itself.
ORDER = ["kernels", "zoo", "train", "eval"]


def imported_modules(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "zoo":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else "zoo"


def sources() -> list[Path]:
    # zoo/kernels, zoo/train and zoo/eval are links, which rglob does not enter.
    return sorted(p for package in ORDER for p in (ROOT / package).rglob("*.py") if (ROOT / package) in p.parents)


def owner(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[1] if relative.parts[0] == "zoo" and relative.parts[1] in ORDER else relative.parts[0]


def test_there_are_sources_of_every_package() -> None:
    assert {owner(path) for path in sources()} == set(ORDER)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    own = owner(path)
    for module in imported_modules(path):
        assert module.split(".")[0] not in ("kernels", "train", "eval", "tests"), f"{path}: import zoo.{module}"
        package = package_of(module)
        if package is not None and not (own == "kernels" and module == "zoo"):
            assert ORDER.index(package) <= ORDER.index(own), f"{path} imports {module}, which stands above it"


def run_python(code: str, **kwargs) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light() -> None:
    heavy = [
        "numba",
        "triton",
        "transformers",
        "lightning",
        "hydra",
        "omegaconf",
        "datasets",
        "matplotlib",
        "mamba_ssm",
    ]
    code = f"import sys, zoo; zoo.create_model('mamba', vocab_size=2); print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize("inside", [True, False])
def test_the_name_kernels_is_left_to_its_owner(inside: bool, tmp_path) -> None:
    """A package called kernels, as Hugging Face has one, is found from the checkout's root and from elsewhere."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OWNER = 'somebody else'\n")
    (tmp_path / "kernels" / "layer.py").write_text("from kernels import OWNER\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "import kernels, kernels.layer, zoo.kernels\n"
        "assert kernels.layer.OWNER == 'somebody else'\n"
        "assert zoo.kernels.selective_scan and zoo.kernels is not kernels"
    )
    run_python(code, cwd=ROOT if inside else tmp_path / "kernels")
