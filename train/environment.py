"""What a run depends on besides its settings: versions, commit, device."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import zoo

_PACKAGES = ("torch", "lightning", "torchmetrics", "numpy", "numba", "triton", "datasets", "mamba-ssm", "causal-conv1d")


def versions() -> dict[str, str]:
    """Versions of Python, the zoo and the installed packages that can change a result."""
    found = {"python": platform.python_version(), "zoo": zoo.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def git_commit() -> str | None:
    """The commit of the zoo's checkout, with "-dirty" behind it if tracked files differ; None outside a checkout."""
    source = Path(zoo.__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", "-C", str(source.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed copy may lie inside a checkout of something else, which does not track it.
        git("ls-files", "--error-unmatch", source.name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe_device(device: torch.device) -> str:
    """The device in words: "cuda: NVIDIA H100 80GB HBM3", "cpu: AMD EPYC 9454, 2 threads"."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"cpu: {_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or os.name
