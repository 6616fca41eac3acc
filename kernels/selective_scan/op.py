"""Public face of the selective scan: argument checks, choice of backend, registration with torch.

Shape letters: B batch, T time, D channels, N state size, K = ceil(T / CHUNK) chunks.

Each compiled backend is a module with two functions, which the custom ops below call:

    forward(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, segment_ids, save_checkpoints)
        -> (y, final_state, checkpoints)
    backward(dy, dfinal_state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, segment_ids, checkpoints)
        -> (du, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state)

An absent optional is None, in and out; dfinal_state may be None too. Tensors arrive in their own dtypes and with any
strides (z, B and C are often views into a projection); dy is contiguous. y has u's dtype and is contiguous,
final_state and checkpoints have the state's dtype (`state_dtype`), gradients may have any floating dtype: they are
cast to their input's dtype here. dinitial_state is always returned; backward drops it where there was no initial_state.
checkpoints (B, K, D, N) holds the state at the START of each chunk, so `checkpoints[:, 0]` is the initial state; it is
an empty tensor of shape (0,) where save_checkpoints is False. Where a segment begins exactly at a chunk's start the
stored state is still the one before the reset.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels import backends
from zoo.kernels.checks import check_tensors
from zoo.kernels.selective_scan.reference import reference

CHUNK = 32
"""Steps between stored states: the backward pass recomputes the states of one chunk at a time."""


def _why_not_cuda(device_type: str, features: backends.Features) -> str | None:
    if device_type != "cuda":
        return f"needs a CUDA device, the tensors are on {device_type}"
    for feature in ("initial_state", "segment_ids", "float64", "d_state > 256"):
        if feature in features:
            return f"mamba-ssm's selective_scan_fn does not take {feature}"
    return backends.missing("mamba_ssm", "cuda")


def _why_not_triton(device_type: str, features: backends.Features) -> str | None:
    if device_type not in ("cuda", "cpu"):
        return f"needs a CUDA device, the tensors are on {device_type}"
    reason = backends.missing("triton", "cuda")
    if reason is None and "float64" in features:
        reason = "its kernels compute in float32, the inputs are float64"
    if reason is None and device_type == "cpu" and not _triton_interprets():
        reason = "needs a CUDA device; on a CPU only under TRITON_INTERPRET=1, set before the process starts"
    return reason


def _triton_interprets() -> bool:
    # Triton decides when a kernel is decorated, so once the kernels are loaded the environment no longer matters.
    loaded = sys.modules.get("zoo.kernels.selective_scan.triton_backend")
    return loaded.INTERPRETED if loaded else os.environ.get("TRITON_INTERPRET") == "1"


def _why_not_numba(device_type: str, features: backends.Features) -> str | None:
    if device_type not in ("cpu", "meta"):
        return f"runs on CPU tensors, these are on {device_type}"
    return backends.missing("numba", "test")


backends.register(
    "selective_scan",
    [
        backends.Backend("cuda", _why_not_cuda),
        backends.Backend("triton", _why_not_triton),
        backends.Backend("numba", _why_not_numba),
        backends.Backend("reference", lambda device_type, features: None),
    ],
)
