"""One mechanism by which every operator chooses its backend, says why, and remembers what it used."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from zoo.kernels.errors import BackendError, did_you_mean

logger = logging.getLogger("zoo.kernels")

Features = tuple[str, ...]
"""What a call asks for beyond the plain case, e.g. `("segment_ids", "float64")`: what a backend may have to refuse."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Attributes:
        name: What the caller writes in `backend=`.
        why_not: `(device_type, features) -> reason`, or None where it can run. Must not import heavy packages.
    """

    name: str
    why_not: Callable[[str, Features], str | None]


@dataclass(frozen=True)
class Operator:
    """An operator and its backends, the fastest first."""

    name: str
    backends: tuple[Backend, ...]


_operators: dict[str, Operator] = {}
_used: dict[str, dict[str, None]] = {}


def register(name: str, backends: Sequence[Backend]) -> None:
    """Makes an operator known; its `backends` are tried in the order given."""
    _operators[name] = Operator(name, tuple(backends))


def operators() -> tuple[Operator, ...]:
    """Returns every registered operator."""
    return tuple(_operators.values())


def missing(package: str, requirement: str) -> str | None:
    """Says that `package` is not installed and how to install it, or returns None where it is there."""
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed (pip install {requirement})"
    return None


def anywhere(device_type: str, features: Features) -> None:
    """`Backend.why_not` of one that runs every call."""


def numba(device_type: str, features: Features) -> str | None:
    """`Backend.why_not` of compiled CPU loops."""
    if device_type not in ("cpu", "meta"):
        return f"runs on CPU tensors, these are on {device_type}"
    return missing("numba", "numba")


def triton(operator: str, limits: Mapping[str, str] | None = None) -> Callable[[str, Features], str | None]:
    """Makes the `Backend.why_not` of an operator's own Triton kernels.

    Args:
        operator: Its name; its `triton_backend` has `INTERPRETED`.
        limits: Features that the kernels do not take beside float64 -> what they do take.
    """

    def interprets() -> bool:
        # Triton decides when a kernel is decorated, so once the kernels are loaded the environment no longer matters.
        loaded = sys.modules.get(f"zoo.kernels.{operator}.triton_backend")
        return loaded.INTERPRETED if loaded else os.environ.get("TRITON_INTERPRET") == "1"

    def why_not(device_type: str, features: Features) -> str | None:
        if device_type not in ("cuda", "cpu"):
            return f"needs a CUDA device, the tensors are on {device_type}"
        reason = missing("triton", "'subquadratic-zoo[cuda]'")
        if reason is not None:
            return reason
        if "float64" in features:
            return "its kernels compute in float32, the inputs are float64"
        for feature, limit in (limits or {}).items():
            if feature in features:
                return limit
        if device_type == "cpu" and not interprets():
            return "needs a CUDA device; on a CPU only under TRITON_INTERPRET=1, set before the process starts"
        return None

    return why_not


def cuda(package: str, function: str, refused: Sequence[str]) -> Callable[[str, Features], str | None]:
    """Makes the `Backend.why_not` of another package's CUDA kernels.

    Args:
        package: The module that must be importable.
        function: What is called there, for the message ("mamba-ssm's selective_scan_fn").
        refused: Features that it does not take.
    """

    def why_not(device_type: str, features: Features) -> str | None:
        if device_type != "cuda":
            return f"needs a CUDA device, the tensors are on {device_type}"
        for feature in refused:
            if feature in features:
                return f"{function} does not take {feature}"
        return missing(package, "'subquadratic-zoo[cuda]'")

    return why_not


@functools.cache
def load(operator: str, backend: str) -> ModuleType:
    """Imports the module of a backend, `zoo.kernels.<operator>.<backend>_backend`, when a call first needs it."""
    try:
        return importlib.import_module(f"zoo.kernels.{operator}.{backend}_backend")
    except (ImportError, OSError) as error:  # a package compiled for another torch, say
        reason = str(error).splitlines()[0]
        raise BackendError(
            f"{operator}: backend {backend!r} is installed but does not load: {reason}; reinstall it or name another"
        ) from error


def resolve(operator: str, requested: str, device_type: str, features: Features = ()) -> str:
    """Chooses the backend for one call.

    Args:
        operator: Name of a registered operator.
        requested: `"auto"` for the fastest that can run, or a backend's name.
        device_type: `tensor.device.type` of the inputs.
        features: What the call asks for, see `Features`.

    Returns:
        The name of the backend that runs the call.

    Raises:
        BackendError: The named backend does not exist, or cannot run this call; nothing else is taken in its place.
    """
    chosen = _choose(operator, requested, device_type, features)
    record(operator, chosen)
    return chosen


# torch.compile then takes the result as a constant instead of tracing into logging and package look-ups. The public
# spelling, torch.compiler.assume_constant_result, does no more than this but first imports all of torch._dynamo.
vars(resolve)["_dynamo_marked_constant"] = True


@functools.cache
def _choose(operator: str, requested: str, device_type: str, features: Features) -> str:
    backends = _operators[operator].backends
    names = [backend.name for backend in backends]
    if requested not in ("auto", *names):
        mend = did_you_mean(requested, ["auto", *names])
        raise BackendError(f"{operator}: no backend is called {requested!r}: {mend}")
    rejected: list[str] = []
    for backend in backends:
        if requested not in ("auto", backend.name):
            continue
        reason = backend.why_not(device_type, features)
        if reason is None:
            asked = f" with {', '.join(features)}" if features else ""
            because = f" (not {'; not '.join(rejected)})" if rejected else ""
            logger.info("%s on %s%s runs on backend %s%s", operator, device_type, asked, backend.name, because)
            return backend.name
        if requested != "auto":
            raise BackendError(f"{operator}: backend {requested!r} cannot run this: {reason}; or pass backend='auto'")
        rejected.append(f"{backend.name}: {reason}")
    raise BackendError(f"{operator}: no backend runs on {device_type}: {'; '.join(rejected)}")


def record(operator: str, backend: str) -> None:
    """Notes that a backend of an operator was used."""
    _used.setdefault(operator, {})[backend] = None


def used() -> dict[str, str]:
    """Returns the backends that ran in this process: operator -> names joined by "+", in order of first use."""
    return {operator: "+".join(names) for operator, names in _used.items()}


def forget() -> None:
    """Begins anew what `used` returns."""
    _used.clear()


def describe(device_type: str) -> list[tuple[str, str, list[tuple[str, str | None]]]]:
    """For each operator: its name, the backend that `auto` takes on this device, and (backend, reason why not)."""
    rows = []
    for operator in operators():
        verdicts = [(backend.name, backend.why_not(device_type, ())) for backend in operator.backends]
        choice = next((name for name, reason in verdicts if reason is None), "none")
        rows.append((operator.name, choice, verdicts))
    return rows
