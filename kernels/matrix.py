"""Small matrices in flat arrays, for numba kernels: products and transposes in vectors of 16 numbers.

A matrix is an array, the index of its first element and the distance between rows. Products keep a tile of 4 rows by
up to 4 vectors of the result in registers, which is what it takes to keep the multipliers of a core busy.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from zoo.kernels.simd import FLAGS, LANES, Vector, _splat, intrinsic, jit, load, splat, store

TILE_ROWS = 4
"""The height of every product is a multiple of it."""


def _pointers(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any) -> Any:
    """Returns `index -> pointer` to a number of the array."""
    data = context.make_array(array_type)(context, builder, array).data
    return lambda index: builder.gep(data, [index])


def _product_tile(n_vectors: int) -> Any:
    """Makes the intrinsic that adds the product of two matrices to a tile of TILE_ROWS rows by `n_vectors` vectors."""

    @intrinsic
    def add_product(
        typing: Any, out: Any, out_at: Any, out_row: Any, a: Any, a_at: Any, a_row: Any, a_step: Any, b: Any, b_at: Any,
        b_row: Any, depth: Any,
    ) -> Any:  # fmt: skip
        vector = Vector(out.dtype)
        align = out.dtype.bitwidth // 8

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
            out_, out_at, out_row, a_, a_at, a_row, a_step, b_, b_at, b_row, depth = values
            pointer = context.get_value_type(vector).as_pointer()
            out_pointer, a_pointer, b_pointer = (
                _pointers(context, builder, signature.args[i], x) for i, x in ((0, out_), (3, a_), (7, b_))
            )

            def index(start: ir.Value, row: ir.Value, rows: int, column: int = 0) -> ir.Value:
                whole = ir.IntType(64)
                return builder.add(builder.add(start, builder.mul(row, whole(rows))), whole(column))

            tile = [(i, j) for i in range(TILE_ROWS) for j in range(n_vectors)]
            addresses = {
                (i, j): builder.bitcast(out_pointer(index(out_at, out_row, i, j * LANES)), pointer) for i, j in tile
            }
            sums = {at: cgutils.alloca_once_value(builder, builder.load(addresses[at], align=align)) for at in tile}
            with cgutils.for_range(builder, depth) as loop:
                b_start = builder.add(b_at, builder.mul(loop.index, b_row))
                a_start = builder.add(a_at, builder.mul(loop.index, a_step))
                b_vectors = [
                    builder.load(builder.bitcast(b_pointer(index(b_start, b_row, 0, j * LANES)), pointer), align=align)
                    for j in range(n_vectors)
                ]
                for i in range(TILE_ROWS):
                    number = builder.load(a_pointer(index(a_start, a_row, i)))
                    many = _splat(builder, number)
                    for j in range(n_vectors):
                        product = builder.fmul(many, b_vectors[j], flags=FLAGS)
                        builder.store(builder.fadd(builder.load(sums[i, j]), product, flags=FLAGS), sums[i, j])
            for at in tile:
                builder.store(builder.load(sums[at]), addresses[at], align=align)
            return context.get_dummy_value()

        whole = types.intp
        return types.none(out, whole, whole, a, whole, whole, whole, b, whole, whole, whole), codegen

    return add_product


_tile_1, _tile_2, _tile_4 = (_product_tile(n) for n in (1, 2, 4))


@jit
def add_product(out, out_at, out_row, height, width, a, a_at, a_row, a_step, b, b_at, b_row, depth):
    """out[i, j] += sum over k of a[i, k] b[k, j].

    Args:
        out: Array of the result, `height` by `width` from `out_at` on; a row is `out_row` numbers after the last.
        out_at: See `out`.
        out_row: See `out`.
        height: A multiple of TILE_ROWS.
        width: A multiple of LANES.
        a: Array with a[i, k] at `a_at + i a_row + k a_step`: either way round.
        a_at: See `a`.
        a_row: See `a`.
        a_step: See `a`.
        b: Array with b[k, j] at `b_at + k b_row + j`.
        b_at: See `b`.
        b_row: See `b`.
        depth: How many k there are.
    """
    for i in range(0, height, TILE_ROWS):
        o = out_at + i * out_row
        first = a_at + i * a_row
        j = 0
        while width - j >= 4 * LANES:
            _tile_4(out, o + j, out_row, a, first, a_row, a_step, b, b_at + j, b_row, depth)
            j += 4 * LANES
        if width - j >= 2 * LANES:
            _tile_2(out, o + j, out_row, a, first, a_row, a_step, b, b_at + j, b_row, depth)
            j += 2 * LANES
        if width - j >= LANES:
            _tile_1(out, o + j, out_row, a, first, a_row, a_step, b, b_at + j, b_row, depth)


@intrinsic
def _transpose_block(typing: Any, source: Any, at: Any, row: Any, out: Any, out_at: Any, out_row: Any) -> Any:
    """Transposes LANES rows of LANES numbers: four rounds that swap ever larger off-diagonal blocks."""
    vector = Vector(source.dtype)
    align = source.dtype.bitwidth // 8

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        source_, at, row, out_, out_at, out_row = values
        pointer = context.get_value_type(vector).as_pointer()
        read, write = (_pointers(context, builder, signature.args[i], x) for i, x in ((0, source_), (3, out_)))

        def address(pointers: Any, start: ir.Value, row: ir.Value, i: int) -> ir.Value:
            place = builder.add(start, builder.mul(row, ir.IntType(64)(i)))
            return builder.bitcast(pointers(place), pointer)

        vectors = [builder.load(address(read, at, row, i), align=align) for i in range(LANES)]
        lanes = ir.VectorType(ir.IntType(32), LANES)
        width = 1
        while width < LANES:
            upper = [lane if not lane & width else lane - width + LANES for lane in range(LANES)]
            lower = [lane + width if not lane & width else lane + LANES for lane in range(LANES)]
            for i in (i for i in range(LANES) if not i & width):
                pair = vectors[i], vectors[i + width]
                vectors[i] = builder.shuffle_vector(*pair, ir.Constant(lanes, upper))
                vectors[i + width] = builder.shuffle_vector(*pair, ir.Constant(lanes, lower))
            width *= 2
        for i, value in enumerate(vectors):
            builder.store(value, address(write, out_at, out_row, i), align=align)
        return context.get_dummy_value()

    whole = types.intp
    return types.none(source, whole, whole, out, whole, whole), codegen


@jit
def transpose(source, at, row, height, width, out, out_at, out_row):
    """out[j, i] = source[i, j] for `height` rows i of `width` numbers; both may be any number."""
    blocks_down, blocks_across = height // LANES * LANES, width // LANES * LANES
    for i in range(0, blocks_down, LANES):
        for j in range(0, blocks_across, LANES):
            _transpose_block(source, at + i * row + j, row, out, out_at + j * out_row + i, out_row)
        for j in range(blocks_across, width):
            for k in range(i, i + LANES):
                out[out_at + j * out_row + k] = source[at + k * row + j]
    for i in range(blocks_down, height):
        for j in range(width):
            out[out_at + j * out_row + i] = source[at + i * row + j]


@jit
def clear(out, at, count):
    """Writes `count` zeros."""
    for i in range(at, at + count):
        out[i] = 0.0


@jit
def copy(source, at, row, height, width, out, out_at, out_row, factor):
    """Copies factor * source, `height` rows of any `width`; zeros fill the rest of each row's last vector."""
    whole = width // LANES * LANES
    for i in range(height):
        a, o = at + i * row, out_at + i * out_row
        for j in range(0, whole, LANES):
            store(out, o + j, load(source, a + j) * factor)
        if whole < width:
            for j in range(whole, width):
                out[o + j] = source[a + j] * factor
            for j in range(width, whole + LANES):
                out[o + j] = 0.0


@jit
def scale(out, at, row, height, width, factors, factors_at, factor_step):
    """Multiplies row i of a matrix, whole vectors wide, by `factors[factors_at + i factor_step]`."""
    for i in range(height):
        factor = splat(factors[factors_at + i * factor_step])
        for j in range(at + i * row, at + i * row + width, LANES):
            store(out, j, load(out, j) * factor)


@jit
def write(source, at, row, height, width, out, out_at, out_row):
    """Copies where the rows of `source` are whole vectors and those of `out` need not be."""
    whole = width // LANES * LANES
    for i in range(height):
        a, o = at + i * row, out_at + i * out_row
        for j in range(0, whole, LANES):
            store(out, o + j, load(source, a + j))
        for j in range(whole, width):
            out[o + j] = source[a + j]


@jit
def add_scaled(source, at, row, height, width, out, out_at, out_row, factor):
    """Adds factor * source to rows of any width."""
    whole = width // LANES * LANES
    for i in range(height):
        a, o = at + i * row, out_at + i * out_row
        for j in range(0, whole, LANES):
            store(out, o + j, load(out, o + j) + load(source, a + j) * factor)
        for j in range(whole, width):
            out[o + j] += source[a + j] * factor
