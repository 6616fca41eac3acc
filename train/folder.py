"""The folder of a run: its name, its files, and how a killed run is found again."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from zoo.kernels.errors import CheckpointError, ConfigError

# These say where a run goes and whether it goes on, not what it computes.
PLACE_KEYS = frozenset({"name", "runs_dir", "resume"})
CHECKPOINT_FILES = f"step-{'[0-9]' * 9}.ckpt"
_LONGEST_NAME = 60
_CHANGES_TOLD = 4


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files."""

    path: Path

    @property
    def config(self) -> Path:
        """Every setting of the run."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Training and validation metrics by step."""
        return self.path / "metrics.csv"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        """What came out; written when the run ends, in whatever way short of a kill."""
        return self.path / "summary.json"

    @property
    def diagnostics(self) -> Path:
        """What the model's memory did in the test, of architectures that show it; a picture lies beside it."""
        return self.path / "diagnostics.json"

    @property
    def model(self) -> Path:
        """The trained model, as `zoo.load_pretrained` reads it."""
        return self.path / "model"

    def read_config(self) -> dict[str, Any] | None:
        """The settings in `config.yaml`; None where it is missing or unreadable."""
        try:
            tree = OmegaConf.to_container(OmegaConf.load(self.config))
        except Exception:  # OmegaConf passes on whatever the YAML parser raises
            return None
        return {str(key): value for key, value in tree.items()} if isinstance(tree, dict) else None

    def write_config(self, tree: dict[str, Any]) -> None:
        """Writes the settings."""
        replace_text(self.config, OmegaConf.to_yaml(OmegaConf.create(tree)))

    def read_summary(self) -> dict[str, Any] | None:
        """The summary; None where it is missing or damaged."""
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return summary if isinstance(summary, dict) else None

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes the summary as strict JSON: numbers that are not finite become null."""
        _write_json(self.summary, summary)

    def write_diagnostics(self, found: dict[str, Any]) -> None:
        """Writes what `zoo.train.diagnostics.collect` found, likewise."""
        _write_json(self.diagnostics, found)

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint of the latest step, or None."""
        return max(self.checkpoints.glob(CHECKPOINT_FILES), default=None)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    replace_text(path, json.dumps(_finite(tree), indent=2, allow_nan=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that it is complete or as before, also when the process is killed."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def default_name(tree: dict[str, Any], defaults: dict[str, Any]) -> str:
    """A name made of architecture, dataset, objective, segments and what else differs: "mamba-mqar-d_state32-s1".

    Args:
        tree: The settings of the run.
        defaults: The settings of a run with this architecture and dataset and nothing else said.
    """
    objective = "" if tree["objective"] == "causal" else f"-{tree['objective']}"
    segments = "" if tree["trainer"]["segment_length"] is None else f"-segments{tree['trainer']['segment_length']}"
    base = f"{tree['arch']['name']}-{tree['data']['name']}{objective}{segments}"
    mask_rate = "" if tree["mask_rate"] is None else f"-mask_rate{_short(tree['mask_rate'])}"
    seed = f"-s{tree['seed']}" if tree["seed"] else ""
    changes = mask_rate + "".join(
        f"-{key}{_short(value)}"
        for group in ("arch", "data", "optim")
        for key, value in tree[group].items()
        if key not in ("name", "path") and value is not None and value != defaults[group].get(key)
    )
    # Long lists of changes read worse than a number, which `claim` appends.
    return base + (changes if len(base + changes + seed) <= _LONGEST_NAME else "") + seed


def claim(runs_dir: Path, name: str | None, fallback: str) -> RunFolder:
    """Makes the folder of a new run, under the given name, else under `fallback` with a number where that is taken.

    Raises:
        ConfigError: There is a run of the given name, or the folder cannot be made.
    """
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = runs_dir / (name or (fallback if number == 1 else f"{fallback}-{number}"))
            try:
                path.mkdir(parents=True)
                return RunFolder(path)
            except FileExistsError:
                if name:
                    raise ConfigError(
                        f"there is a run {path} already: resume=true goes on with it, name=... starts another"
                    ) from None
                number += 1
    except OSError as error:
        raise ConfigError(f"runs_dir={runs_dir} cannot be written ({error.strerror}): pass runs_dir=...") from error


def find(runs_dir: Path, name: str | None, fallback: str, tree: dict[str, Any]) -> RunFolder | None:
    """The newest run of that name with the same settings; None if there is no run of that name.

    Raises:
        CheckpointError: There are runs of that name, all with other settings, or with settings that cannot be read; the
            message says which differ.
    """
    if name:
        paths = [runs_dir / name]
    else:
        pattern = re.compile(rf"{re.escape(fallback)}(?:-(\d+))?")
        matches = [(path, pattern.fullmatch(path.name)) for path in runs_dir.glob(f"{fallback}*")]
        numbered = [(int(match[1] or 1), path) for path, match in matches if match]
        paths = [path for _, path in sorted(numbered, reverse=True)]
    # Without a name, a folder without settings is left alone: killed at its very start, or none of ours.
    folders = [folder for folder in map(RunFolder, paths) if folder.path.is_dir() and (name or folder.config.exists())]
    configs = [(folder, folder.read_config()) for folder in folders]
    for folder, config in configs:
        if config and not different_keys(config, tree):
            return folder
    for folder, config in configs:
        if not config:
            raise CheckpointError(
                f"resume=true: {folder.config} is {'damaged' if folder.config.exists() else 'missing'}, so that nobody "
                f"knows whether its settings are these: restore it, or start another run with name=..."
            )
    if configs:
        folder, changes = folders[0], different_keys(configs[0][1] or {}, tree)
        told = ", ".join(f"{key}: {old} there, {new} now" for key, old, new in changes[:_CHANGES_TOLD])
        more = f" and {len(changes) - _CHANGES_TOLD} more" if len(changes) > _CHANGES_TOLD else ""
        raise CheckpointError(
            f"resume=true: {folder.path} was run with other settings ({told}{more}): "
            f"repeat its command, or start anew without resume"
        )
    return None


def different_keys(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The settings that differ, as (dotted key, old, new) in words; the place of a run does not count."""
    flat_old, flat_new = _flat(old), _flat(new)
    keys = [key for key in {**flat_old, **flat_new} if key not in PLACE_KEYS]
    return [
        (key, _shown(flat_old, key), _shown(flat_new, key)) for key in keys if flat_old.get(key) != flat_new.get(key)
    ]


def _shown(flat: dict[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "no such setting"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
