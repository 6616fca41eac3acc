"""The command line of `python -m zoo.train`: Hydra composes the settings, every error becomes one line."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from zoo.console import report, run_cli
from zoo.kernels.errors import ConfigError, ZooError, did_you_mean
from zoo.registry import architecture, list_models
from zoo.settings import Settings, describe_type, field_types
from zoo.train.config import (
    CONFIG_NAME,
    OPTIMISERS,
    TRAINERS,
    RunConfig,
    from_hydra,
    register_configs,
    with_init,
)
from zoo.train.data import get_data, list_data
from zoo.train.errors import RunError, foreseen
from zoo.train.help import help_text

_failures: list[tuple[str, Exception]] = []


def main() -> int:
    """Runs the command line; returns the exit status."""
    return run_cli(_main, translate)


def _main() -> int:
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(help_text(arguments))
        return 0
    words, options = _split(arguments)
    sys.argv[1:] = [*with_init(words), *options]  # Hydra wants the settings in one piece
    sweep = not {"-m", "--multirun"}.isdisjoint(options)
    if sweep:
        _check_sweep(words)
    # Hydra would print its own account of an error; this lets the error through to `run_cli`.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    _failures.clear()
    register_configs()
    _task()
    if _failures and not sweep:
        raise _failures[0][1]
    if _failures:
        raise RunError(f"{len(_failures)} of the sweep's runs failed: {'; '.join(words for words, _ in _failures)}")
    return 0


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The settings among the words of a command line, and Hydra's own options with their values."""
    words, options = [], []
    rest = iter(arguments)
    for word in rest:
        if not word.startswith("-"):
            words.append(word)
            continue
        option = word.partition("=")[0]
        if option not in _SWITCHES | _OPTIONS:
            raise ConfigError(f"no option {option!r}: settings are written key=value, --help lists them")
        options.append(word)
        if option in _OPTIONS and option == word:
            options += [value] if (value := next(rest, None)) is not None else []
    return words, options


# fmt: off
_SWITCHES = {"-m", "--multirun", "-r", "--run", "--resolve", "--hydra-help", "--version"}
_OPTIONS = {
    "-c", "--cfg", "-p", "--package", "-i", "--info", "-cp", "--config-path", "-cn", "--config-name", "-cd",
    "--config-dir", "-sc", "--shell-completion", "--experimental-rerun",
}
# fmt: on


def _check_sweep(words: Sequence[str]) -> None:
    """Refuses runs of one sweep that would want the same folder."""
    overrides = OverridesParser.create().parse_overrides(list(words))
    if any(override.is_sweep_override() for override in overrides):
        for override in overrides:
            name = override.value()
            if override.key_or_group == "name" and isinstance(name, str) and "${" not in name:
                raise ConfigError(
                    f"name={name} is one folder for several runs: leave it out, or say what differs, as in "
                    f"'name={name}-${{seed}}'"
                )


@hydra.main(version_base="1.3", config_path=None, config_name=CONFIG_NAME)
def _task(composed: DictConfig) -> None:
    """One run, as Hydra's launchers call it."""
    from zoo.train.run import run

    words = [str(word) for word in OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False) or []]
    command = shlex.join(["python", "-m", "zoo.train", *words])
    try:
        run(from_hydra(composed), command=command)
    except Exception as error:
        # Hydra's own launcher prints a line of its own for an error that passes through it, and ends the sweep. Other
        # launchers run this in another process, where the exception itself must tell of the failure.
        if not HydraConfig.get().launcher._target_.endswith("BasicLauncher"):
            raise
        _failures.append((" ".join(words), error))
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            report(error, translate)


def translate(error: Exception) -> ZooError | None:
    """The one-line error that an exception of Hydra or OmegaConf stands for; None for any other."""
    if isinstance(error, ZooError):
        return error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(error.missing_cfg_file)
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override!r} is not understood: {_quoted(str(error.override))}")
    several = re.search(r"Ambiguous value for argument '(.*)'", str(error))
    if several:
        return ConfigError(
            f"{several[1]!r} are several values: -m before them makes a run of each; as one value, "
            f"{_quoted(several[1])}"
        )
    if isinstance(error, ConfigCompositionException) and isinstance(error.__cause__, OmegaConfBaseException):
        return _bad_override(error.__cause__)
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return ConfigError(f"{str(error).strip().splitlines()[0]} (`python -m zoo.train --help` lists the settings)")
    return foreseen(error)


def _quoted(override: str) -> str:
    """What to write instead of `key=value` where the value has characters that mean something to Hydra or the shell."""
    key, equals, value = override.partition("=")
    if not equals:
        return "write key=value"
    escaped = value.replace('"', '\\"')
    word = shlex.quote(f'{key}="{escaped}"')
    return f"write {word}, which takes the value as it stands"


def _unknown_option(path: str) -> ZooError:
    """The error for `group=option` where there is no such option."""
    group, _, option = path.partition("/")
    try:
        if group == "arch":
            architecture(option)
        elif group == "data":
            get_data(option)
    except ZooError as error:
        return error
    known = _GROUPS.get(group, list)()
    return ConfigError(f"no {group} {option!r}: {did_you_mean(option, known)}")


def _bad_override(cause: OmegaConfBaseException) -> ZooError:
    """The error for `key=value` where the key is unknown or the value has the wrong type."""
    full_key = str(cause.full_key)
    group, _, key = full_key.rpartition(".")
    settings = cause.parent_node._metadata.object_type if cause.parent_node is not None else None
    hints = field_types(settings) if isinstance(settings, type) and issubclass(settings, Settings) else {}
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        known = set(hints) - {"defaults", "hydra", "name"} if group else [*_GROUPS, *field_types(RunConfig)]
        where = f"{group} has no setting {key!r}" if group else f"no setting {key!r}"
        return ConfigError(f"{where}: {did_you_mean(key, known)}")
    if isinstance(cause, ValidationError) and key in hints:
        return ConfigError(f"{full_key}={cause.value} is not valid: expected {describe_type(hints[key])}")
    return ConfigError(f"{full_key}: {str(cause).splitlines()[0]}")


_GROUPS: dict[str, Callable[[], list[str]]] = {
    "arch": list_models,
    "data": list_data,
    "trainer": lambda: list(TRAINERS),
    "optim": lambda: list(OPTIMISERS),
}
