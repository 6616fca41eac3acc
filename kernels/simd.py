"""Vectors of 16 numbers for numba kernels, so that vector code is written down instead of hoped for.

LLVM's loop vectoriser gives up where it cannot prove that two arrays do not overlap, and that changes with every edit
of a kernel. A `Vector` is one value of LLVM's vector type: arithmetic on it is one instruction on a machine with
512-bit registers, two or four on a narrower one. Numba only; nothing here runs in the plain interpreter.
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import extending, njit, types
from numba.core import cgutils
from numba.extending import models, overload, register_model
from numpy.polynomial import Chebyshev, Polynomial

LANES = 16
intrinsic: Any = extending.intrinsic  # typed in numba as if the typing context were an argument of the call
LOG2_E = 1 / math.log(2)

# Products may fuse with sums, but nothing is reordered and NaN and infinity keep their meaning.
FLAGS = ("contract",)
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(FLAGS)}

_BELOW = [Path(__file__), Path(__file__).with_name("matrix.py")]

inlined = njit(**OPTIONS, forceinline=True)
"""Decorates a helper of a kernel's inner loop."""


def jit(function: Any) -> Any:
    """Decorates a kernel: compiled at its first call, then kept on disk."""
    # Numba's cache watches the kernel's own file alone; under a name with a digest of the files that it builds on, the
    # kernel is compiled again when a constant of its folder, or of one that its file takes kernels from, or the vectors
    # and small matrices below them change.
    used = (getattr(value, "py_func", None) for value in function.__globals__.values())
    paths = [Path(f.__code__.co_filename) for f in used if f is not None]
    folders = {path.parent for path in paths if path not in _BELOW} | {Path(function.__code__.co_filename).parent}
    files = [path for folder in sorted(folders) for path in sorted(folder.glob("*.py"))]
    sources = b"".join(path.read_bytes() for path in [*_BELOW, *files])
    function.__qualname__ += f"_{zlib.crc32(sources):08x}"
    return njit(**OPTIONS, cache=True)(function)


class Vector(types.Type):
    """`LANES` floats of one dtype."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype} x {LANES})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        element = manager.lookup(vector.dtype).get_value_type()
        super().__init__(manager, vector, ir.VectorType(element, LANES))


def _splat(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    vector = ir.VectorType(scalar.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, first, zeros)


def _operands(context: Any, builder: ir.IRBuilder, vector: Vector, kinds: Any, values: Any) -> list[ir.Value]:
    """Turns scalars among the operands into vectors of the same dtype."""
    return [
        value if kind == vector else _splat(builder, context.cast(builder, value, kind, vector.dtype))
        for kind, value in zip(kinds, values, strict=True)
    ]


def _elementwise(emit: Callable[..., ir.Value]) -> Callable[..., Any]:
    """Makes an intrinsic of two operands, at least one of them a vector, out of `emit(builder, a, b)`."""

    @intrinsic
    def apply(typing: Any, a: Any, b: Any) -> Any:
        vector = a if isinstance(a, Vector) else b

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
            return emit(builder, *_operands(context, builder, vector, signature.args, values))

        return vector(a, b), codegen

    return apply


def _overload_operator(symbol: Callable[..., Any], emit: Callable[..., ir.Value]) -> None:
    apply = _elementwise(emit)

    @overload(symbol)
    def _(a, b):  # type: ignore[no-untyped-def]  # numba compares the signature with the lambda's, annotations included
        if isinstance(a, Vector) or isinstance(b, Vector):
            return lambda a, b: apply(a, b)
        return None


_overload_operator(operator.add, lambda builder, a, b: builder.fadd(a, b, flags=FLAGS))
_overload_operator(operator.sub, lambda builder, a, b: builder.fsub(a, b, flags=FLAGS))
_overload_operator(operator.mul, lambda builder, a, b: builder.fmul(a, b, flags=FLAGS))
_overload_operator(operator.truediv, lambda builder, a, b: builder.fdiv(a, b, flags=FLAGS))

# A comparison with NaN is false, so NaN in the first operand passes through both.
at_least = _elementwise(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), b, a))
at_most = _elementwise(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), b, a))


@intrinsic
def where_negative(typing: Any, condition: Any, yes: Any, no: Any) -> Any:
    """Selects, lane by lane, `yes` where `condition` is below zero and `no` elsewhere."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        zero = ir.Constant(values[0].type, [0.0] * LANES)
        return builder.select(builder.fcmp_ordered("<", values[0], zero), values[1], values[2])

    return condition(condition, yes, no), codegen


@intrinsic
def splat(typing: Any, scalar: Any) -> Any:
    """A vector with `scalar` in every lane."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        return _splat(builder, values[0])

    return Vector(scalar)(scalar), codegen


def _address(context: Any, builder: ir.IRBuilder, signature: Any, values: Any, vector: Vector) -> ir.Value:
    array = context.make_array(signature.args[0])(context, builder, values[0])
    pointer = builder.gep(array.data, [values[1]])
    return builder.bitcast(pointer, context.get_value_type(vector).as_pointer())


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """Reads `array[index : index + LANES]` of a contiguous one-dimensional array; bounds are the caller's business."""
    vector = Vector(array.dtype)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        address = _address(context, builder, signature, values, vector)
        return builder.load(address, align=array.dtype.bitwidth // 8)

    return vector(array, types.intp), codegen


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Writes `array[index : index + LANES] = value`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        address = _address(context, builder, signature, values, value)
        builder.store(values[2], address, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, value), codegen


@intrinsic
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Asks for the cache line of `array[index]`, to be there some microseconds later; any index is allowed."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        address = _address(context, builder, signature, values, Vector(array.dtype))
        word = ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [address.type, word, word, word]), "llvm.prefetch.p0"
        )
        builder.call(function, [address, word(0), word(2), word(1)])  # to read, into the second-level cache, data
        return context.get_dummy_value()

    return types.none(array, types.intp), codegen


@inlined
def scratch(count, like):  # type: ignore[no-untyped-def]
    """Uninitialised memory of a kernel, of the dtype of `like`, whose vectors do not straddle cache lines."""
    memory = np.empty(count + LANES, like.dtype)
    skip = (-memory.ctypes.data // memory.itemsize) % LANES
    return memory[skip : skip + count]


@intrinsic
def broadcast(typing: Any, array: Any, index: Any) -> Any:
    """A vector with `array[index]` in every lane; no negative index, and so no time spent on one."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        return _splat(builder, builder.load(builder.gep(data, [values[1]])))

    return Vector(array.dtype)(array, types.intp), codegen


def _folded(combine: Callable[..., ir.Value]) -> Callable[..., Any]:
    """Makes the code of a function of all lanes, as a tree of fixed shape: the same on every machine."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        (value,) = values
        width = LANES
        while width > 1:
            width //= 2
            index = ir.VectorType(ir.IntType(32), width)
            low = builder.shuffle_vector(value, value, ir.Constant(index, list(range(width))))
            high = builder.shuffle_vector(value, value, ir.Constant(index, list(range(width, 2 * width))))
            value = combine(builder, low, high)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return codegen


@intrinsic
def total(typing: Any, vector: Any) -> Any:
    """Sum over the lanes."""
    return vector.dtype(vector), _folded(lambda builder, a, b: builder.fadd(a, b))


@intrinsic
def largest(typing: Any, vector: Any) -> Any:
    """Largest of the lanes."""
    return vector.dtype(vector), _folded(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), b, a))


@intrinsic
def totals(typing: Any, array: Any, index: Any) -> Any:
    """Sums of `LANES` vectors that lie behind each other: lane j of the result is the `total` of vector j.

    Each step folds two vectors into one of twice as many half-done sums: a quarter of the work of `LANES` totals.
    """
    vector = Vector(array.dtype)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        address = _address(context, builder, signature, values, vector)
        vectors = [
            builder.load(builder.gep(address, [ir.Constant(ir.IntType(64), j)]), align=array.dtype.bitwidth // 8)
            for j in range(LANES)
        ]
        width = LANES // 2
        while width:
            # A lane whose index has the bit `width` takes its sum from the second vector of a pair.
            own = [lane + LANES * bool(lane & width) for lane in range(LANES)]
            halves = [ir.Constant(ir.VectorType(ir.IntType(32), LANES), [x ^ far for x in own]) for far in (0, width)]
            vectors = [
                builder.fadd(*(builder.shuffle_vector(vectors[j], vectors[j + width], half) for half in halves))
                for j in range(width)
            ]
            width //= 2
        return vectors[0]

    return vector(array, types.intp), codegen


@intrinsic
def absolute(typing: Any, vector: Any) -> Any:
    """|x|."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(values[0].type, [values[0].type]),
            f"llvm.fabs.v{LANES}f{vector.dtype.bitwidth}",
        )
        return builder.call(function, values)

    return vector(vector), codegen


def _coefficients(function: Callable[[Any], Any], degree: int, low: float, high: float) -> list[float]:
    """Coefficients of the near-best polynomial of that degree on [low, high], the constant first."""
    return Chebyshev.interpolate(function, degree, domain=[low, high]).convert(kind=Polynomial).coef.tolist()


def _horner(builder: ir.IRBuilder, coefficients: list[float], x: ir.Value) -> ir.Value:
    value = _constant(x.type, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = builder.fadd(builder.fmul(value, x, flags=FLAGS), _constant(x.type, coefficient), flags=FLAGS)
    return value


def _constant(vector: ir.VectorType, number: float) -> ir.Constant:
    return ir.Constant(vector, [number] * LANES)


@dataclass(frozen=True)
class _Float:
    """What exp and exp2 need to know about a dtype."""

    bits: int
    mantissa: int
    degree: int
    ln2_high: float  # so few bits that a whole number times it is exact
    ln2_low: float

    @property
    def bias(self) -> int:
        return 2 ** (self.bits - self.mantissa - 2) - 1

    @property
    def shift(self) -> float:
        """Adding it rounds x to a whole number n and leaves n + bias - 1 in the lowest bits of the pattern."""
        return 1.5 * 2**self.mantissa + self.bias - 1


_FLOATS = {
    types.float32: _Float(32, 23, 6, 0.693138122558594, 9.05800061445916e-06),
    types.float64: _Float(64, 52, 12, 0.6931471803691238, 1.9082149292705877e-10),
}


def _exponential(base: float) -> Callable[..., Any]:
    """Makes an intrinsic that computes base**x for base 2 or e."""
    ln_base = math.log(base)
    reach = 0.5 * math.log(2) / ln_base

    @intrinsic
    def exponential(typing: Any, vector: Any) -> Any:
        float_ = _FLOATS[vector.dtype]
        # Twice the power: the other half is in the scale, whose exponent then stays in range up to the overflow.
        twice = _coefficients(lambda r: 2.0 * np.exp(ln_base * r), float_.degree, -reach, reach)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
            (x,) = values
            kind = x.type
            integer = ir.VectorType(ir.IntType(float_.bits), LANES)
            low = _constant(kind, (1 - float_.bias) * 2 * reach)
            high = _constant(kind, (float_.bias + 1.5) * 2 * reach)
            shift = _constant(kind, float_.shift)
            x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
            x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
            if base == 2:
                shifted = builder.fadd(x, shift)
                remainder = builder.fsub(x, builder.fsub(shifted, shift))
            else:
                scaled = builder.fmul(x, _constant(kind, LOG2_E), flags=FLAGS)
                shifted = builder.fadd(scaled, shift, flags=FLAGS)
                whole = builder.fsub(shifted, shift)
                remainder = x
                for part in (float_.ln2_high, float_.ln2_low):
                    remainder = builder.fsub(
                        remainder, builder.fmul(whole, _constant(kind, part), flags=FLAGS), flags=FLAGS
                    )
            exponent = builder.shl(builder.bitcast(shifted, integer), ir.Constant(integer, [float_.mantissa] * LANES))
            return builder.fmul(_horner(builder, twice, remainder), builder.bitcast(exponent, kind))

        return vector(vector), codegen

    exponential.__doc__ = """base**x. Results below the smallest normal number are 0; NaN and infinity propagate."""
    return exponential


exp2 = _exponential(2.0)
exp = _exponential(math.e)


def _atanh_series(q: Any) -> Any:
    """2 atanh(s) / s at q = s * s, for q <= 1/9."""
    return sum(2 / (2 * k + 1) * q**k for k in range(20))


_ATANH = {bits: _coefficients(_atanh_series, degree, 0.0, 1 / 9) for bits, degree in ((32, 4), (64, 11))}


@intrinsic
def _atanh_ratio(typing: Any, vector: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        return _horner(builder, _ATANH[vector.dtype.bitwidth], values[0])

    return vector(vector), codegen


@inlined
def softplus_and_slope(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)) and its derivative, the logistic function; both to full relative accuracy on either side."""
    e = exp(0.0 - absolute(x))
    s = e / (e + 2.0)
    value = at_least(x, 0.0) + s * _atanh_ratio(s * s)  # log(1 + e) = 2 atanh(e / (2 + e))
    reciprocal = 1.0 / (e + 1.0)
    return value, where_negative(x, e * reciprocal, reciprocal)


@inlined
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x))."""
    return 1.0 / (exp(0.0 - x) + 1.0)
