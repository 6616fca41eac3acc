"""The vectors of the numba kernels: accuracy of their functions, and that they are vectors at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from zoo.kernels.simd import (
    LANES,
    absolute,
    exp,
    exp2,
    jit,
    load,
    scratch,
    sigmoid,
    softplus_and_slope,
    store,
    total,
    totals,
)


@jit
def run_exp(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, LANES):
        store(out, i, exp(load(x, i)))


@jit
def run_exp2(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, LANES):
        store(out, i, exp2(load(x, i)))


@jit
def run_softplus(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, LANES):
        store(out, i, softplus_and_slope(load(x, i))[0])


@jit
def run_slope(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, LANES):
        store(out, i, softplus_and_slope(load(x, i))[1])


@jit
def run_sigmoid(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, LANES):
        store(out, i, sigmoid(load(x, i)))


@jit
def run_total(x, out):  # type: ignore[no-untyped-def]
    for i in range(0, x.size, LANES):
        out[i // LANES] = total(absolute(load(x, i)))


def logistic(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


# Name, truth, limits at minus and plus infinity, relative error allowed in multiples of the dtype's eps.
FUNCTIONS = [
    (run_exp, np.exp, (0.0, np.inf), 1.3),
    (run_exp2, np.exp2, (0.0, np.inf), 1.3),
    (run_softplus, lambda x: np.maximum(x, 0) + np.log1p(np.exp(-abs(x))), (0.0, np.inf), 3),
    (run_slope, logistic, (0.0, 1.0), 3),
    (run_sigmoid, logistic, (0.0, 1.0), 3),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("run", "truth", "limits", "units"), FUNCTIONS)
def test_accuracy_and_limits(run: Any, truth: Any, limits: tuple[float, float], units: float, dtype: Any) -> None:
    # The polynomials are made in float64 itself, which costs the float64 versions one more digit.
    tolerance = units * np.finfo(dtype).eps * (1 if dtype == np.float32 else 10)
    x = np.linspace(-80, 80, LANES * 20_000).astype(dtype)
    out = np.empty_like(x)
    run(x, out)
    with np.errstate(all="ignore"):
        exact = truth(x.astype(np.longdouble))
    assert np.max(abs(out - exact) / exact) < tolerance

    far = np.array([-np.inf, -1e30, -3e3, np.inf, 1e30, 3e3, np.nan, 0.0] + [0.0] * (LANES - 8), dtype)
    out = np.empty_like(far)
    run(far, out)
    assert (out[:3] == limits[0]).all()
    assert out[3] == limits[1]
    assert np.isnan(out[6])
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(out[[4, 5, 7]], truth(far[[4, 5, 7]]), rtol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp2_keeps_finite_results_up_to_the_edge(dtype: Any) -> None:
    info = np.finfo(dtype)
    top, bottom = float(info.maxexp), float(info.minexp)
    x = np.array([top - 1e-3, top - 0.5, top + 0.01, bottom + 1, bottom - 0.6] + [0.0] * (LANES - 5), dtype)
    out = np.empty_like(x)
    run_exp2(x, out)
    np.testing.assert_allclose(out[:2], np.exp2(x[:2]), rtol=1e-6)
    assert out[2] == np.inf
    np.testing.assert_allclose(out[3], np.exp2(x[3]), rtol=1e-6)
    assert out[4] == 0.0


def test_total_of_magnitudes() -> None:
    x = np.arange(-20, 12, dtype=np.float32)
    out = np.empty(2, np.float32)
    run_total(x, out)
    np.testing.assert_array_equal(out, abs(x).reshape(2, LANES).sum(1))


@jit
def run_totals(x, out):  # type: ignore[no-untyped-def]
    for i in range(out.size // LANES):
        store(out, i * LANES, totals(x, i * LANES * LANES))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_totals_of_many_vectors(dtype: Any) -> None:
    x = np.random.default_rng(0).integers(-1000, 1000, (3 * LANES, LANES)).astype(dtype)
    out = np.empty(3 * LANES, dtype)
    run_totals(x.ravel(), out)
    np.testing.assert_array_equal(out, x.sum(1))


@jit
def place_and_size(count, like):  # type: ignore[no-untyped-def]
    memory = scratch(count, like)
    return memory.ctypes.data, memory.size


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vectors_in_scratch_lie_in_whole_cache_lines(dtype: Any) -> None:
    for count in (1, 16, 1000, 5003):
        place, size = place_and_size(count, np.empty(0, dtype))
        assert place % (LANES * np.dtype(dtype).itemsize) == 0
        assert size == count
