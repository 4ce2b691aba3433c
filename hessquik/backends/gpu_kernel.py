"""The Triton kernel that runs any program: it interprets a table of steps, as :mod:`hessquik.backends.gpu_table` writes it.

One launch evaluates any number of rows. The tiles of rows are distributed in turn over the G instances of the kernel:
instance i computes tiles i, i + G, i + 2G, …. Each instance has its own block of memory. All threads of an instance
compute a step together, with a barrier between steps.

Sums run over ascending indices, one product after the other, for every size of a tile, so a row's result has the same
bits in every tile. Reads beyond an array are masked; no step relies on padding.

The table holds 64-bit integers. A view takes ten of them, see ``_view``. A step has a fixed size:

    0 kind   1 flags   2 outer   3 inner   4 columns   5 depth   6 one row only   7 α (bits of a float64)   8 … views

With small tiles, most time goes into loading numbers of the table and dividing indices. Therefore one flat index e counts
the entries wherever the strides allow it, and a quotient by an extent is a product with its inverse (exact below
2²⁰ entries; the host makes sure of this limit).
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from hessquik.backends import gpu_math

__all__ = ["run_table"]

# Triton reads globals only if they are constexpr.
#: Numbers of the table per view, step and instruction.
VIEW = tl.constexpr(10)
STEP = tl.constexpr(88)
CODE = tl.constexpr(15)

#: Slots of the base addresses; a call's inputs and outputs have the slots from CALL on.
CONSTANT, TILE, SHARED, CALL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
#: Bytes at the beginning of an instance's memory that hold its base addresses.
BASES_BYTES = tl.constexpr(256)

PRODUCT, MAP, SUM_PRODUCTS, PAIRS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

#: Flags of a product.
HAS_D, HAS_C, HAS_E, HAS_S, HAS_F, HAS_T, IN_GROUPS, IS_ALIGNED = (tl.constexpr(1 << i) for i in range(8))
#: Flags of sums of products, of pairs and of maps.
HAS_B, IS_SYMMETRIC, IS_FLAT = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)

#: Number of registers of a map; as an operand, this value stands for the instruction's own number.
REGISTERS = tl.constexpr(8)


@triton.jit
def _view(table, at, bases, first, tile_rows, dtype: tl.constexpr, ALIGNED: tl.constexpr = False):
    """Return the address of a view's first entry in a tile.

    The ten numbers of a view; offsets and strides count array entries:

        0 slot of the base address
        1 offset of the first entry, the part per row of a tile   2 its constant part
        3 row stride in an input or output of the call, else 0
        4 stride of rows   5 of outer   6 of inner   7 of columns
        8 row stride minus the length of the inner entries (products)
        9 columns of zeros to write after the last column
    """
    slot = tl.load(table + at)
    numbers = tl.load(table + at + 1) * tile_rows + tl.load(table + at + 2) + tl.load(table + at + 3) * first
    address = tl.load(bases + slot) + numbers * (dtype.primitive_bitwidth // 8)
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _number(table, at):
    """Return a number of the table as a 32-bit integer."""
    return tl.load(table + at).to(tl.int32)


@triton.jit
def _quotient(e, extent):
    """Return e // extent for 0 ≤ e < 2²⁰, by a product with the inverse that rounding errors cannot change."""
    return ((e.to(tl.float32) + 0.5) * (1.0 / extent.to(tl.float32))).to(tl.int32)


@triton.jit
def _whole(x, dtype: tl.constexpr):
    """Return x, a multiple of 16 bytes, in a form from which the compiler can deduce this."""
    lanes: tl.constexpr = 128 // dtype.primitive_bitwidth
    return x // lanes * lanes


@triton.jit
def _matrix(
    table, at, bases, first, tile_rows, row, outer, e, t, j, ALIGNED: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """Return the addresses of an operand's entries in rows e and columns j; t is the tile's row that e belongs to."""
    pointer = _view(table, at, bases, first, tile_rows, dtype, ALIGNED)
    start = row * _number(table, at + 4) + outer * _number(table, at + 5)
    inner, more = _number(table, at + 6), _number(table, at + 8)
    if ALIGNED:
        pointer += _whole(start, dtype)
        return (pointer + (e * _whole(inner, dtype) + t * _whole(more, dtype)))[:, None] + j[None, :]
    else:
        return (pointer + (start + e * inner + t * more))[:, None] + (j * _number(table, at + 7))[None, :]


@triton.jit
def _product_block(
    table, at, bases, first, tile_rows, row, outer, begin, end, j0,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Compute one block of C = A B + D and E = α C ⊙ S + F ⊙ T: matrix rows from ``begin`` and columns from ``j0`` on.

    Aligned operands have unit column strides, their rows begin at multiples of 16 bytes, and reading a row up to the next
    multiple is allowed. The compiler can then load vectors of 16 bytes.
    """
    flags = tl.load(table + at + 1)
    columns, depth = _number(table, at + 4), _number(table, at + 5)
    e = begin + tl.arange(0, BM)
    t = _quotient(e, _number(table, at + 3))
    j = j0 + tl.arange(0, BN)
    k = tl.arange(0, BK)
    rows = (e < end)[:, None]
    readable, filled = depth, columns
    if ALIGNED:
        lanes: tl.constexpr = 128 // dtype.primitive_bitwidth
        readable = (depth + lanes - 1) // lanes * lanes
        filled = (columns + lanes - 1) // lanes * lanes
    cols = (j < filled)[None, :]
    left = _matrix(table, at + 8, bases, first, tile_rows, row, outer, e, t, k, ALIGNED, dtype)
    right = _matrix(table, at + 8 + VIEW, bases, first, tile_rows, row, outer, k, k * 0, j, ALIGNED, dtype)
    a_step = BK
    b_step = BK * _number(table, at + 8 + VIEW + 6)
    if ALIGNED:
        b_step = _whole(b_step, dtype)
    else:
        a_step = BK * _number(table, at + 8 + 7)
    total = tl.zeros((BM, BN), dtype)
    for k0 in range(0, depth, BK):
        x = tl.load(left, mask=rows & (k < readable - k0)[None, :], other=0.0)
        y = tl.load(right, mask=(k < depth - k0)[:, None] & cols, other=0.0)
        if ALIGNED:
            x = tl.where((k < depth - k0)[None, :], x, 0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION, out_dtype=dtype)
        left += a_step
        right += b_step
    mask = rows & cols
    if flags & HAS_D:
        d = _matrix(table, at + 8 + 2 * VIEW, bases, first, tile_rows, row, outer, e, t, j, ALIGNED, dtype)
        total += tl.load(d, mask=mask, other=0.0)
        if columns != filled:
            total = tl.where((j < columns)[None, :], total, 0.0)
    if flags & HAS_C:
        c = _matrix(table, at + 8 + 3 * VIEW, bases, first, tile_rows, row, outer, e, t, j, ALIGNED, dtype)
        written = columns + _number(table, at + 8 + 3 * VIEW + 9)
        if ALIGNED:
            written = _whole(written, dtype)
        tl.store(c, total, mask=rows & (j < written)[None, :])
    if flags & HAS_E:
        total *= tl.load(table + at + 7).to(tl.float64, bitcast=True).to(dtype)
        if flags & HAS_S:
            s = _matrix(table, at + 8 + 4 * VIEW, bases, first, tile_rows, row, outer, e, t, j, ALIGNED, dtype)
            total *= tl.load(s, mask=mask, other=0.0)
        if flags & HAS_F:
            f = _matrix(table, at + 8 + 5 * VIEW, bases, first, tile_rows, row, outer, e, t, j, ALIGNED, dtype)
            more = tl.load(f, mask=mask, other=0.0)
            if flags & HAS_T:
                by = _matrix(table, at + 8 + 6 * VIEW, bases, first, tile_rows, row, outer, e, t, j, ALIGNED, dtype)
                more *= tl.load(by, mask=mask, other=0.0)
            total += more
        if columns != filled:
            total = tl.where((j < columns)[None, :], total, 0.0)
        out = _matrix(table, at + 8 + 7 * VIEW, bases, first, tile_rows, row, outer, e, t, j, ALIGNED, dtype)
        written = columns + _number(table, at + 8 + 7 * VIEW + 9)
        if ALIGNED:
            written = _whole(written, dtype)
        tl.store(out, total, mask=rows & (j < written)[None, :])


@triton.jit
def _product(
    table, at, bases, first, tile_rows, live,
    BM: tl.constexpr, BN: tl.constexpr, SMALL: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Compute the step C = A B + D and its scaling E, block by block.

    The inner entries of all rows of the tile form the rows of one matrix. If strides forbid that, or if each row has its
    own B, there is one matrix for each row and outer entry.
    """
    width = _number(table, at + 4) + tl.maximum(
        _number(table, at + 8 + 3 * VIEW + 9), _number(table, at + 8 + 7 * VIEW + 9)
    )
    outers, inner = _number(table, at + 2), _number(table, at + 3)
    in_groups = (tl.load(table + at + 1) & IN_GROUPS) != 0
    length = tl.where(in_groups, inner, live * inner)
    groups = tl.where(in_groups, live * outers, 1)
    is_aligned = (tl.load(table + at + 1) & IS_ALIGNED) != 0
    whole = length // BM
    # The remaining rows use blocks of SMALL rows, or one more block of BM rows if there are more than SMALL of them.
    whole += (length - whole * BM > SMALL).to(tl.int32)
    whole = tl.where(is_aligned, whole, 0)
    for group in range(groups):
        row = group // outers
        outer = group - row * outers
        for begin in range(0, whole * BM, BM):
            if width <= SMALL:
                _product_block(
                    table, at, bases, first, tile_rows, row, outer, begin, length, 0,
                    BM, SMALL, BK, True, PRECISION, dtype,
                )  # fmt: skip
            else:
                for j0 in range(0, width, BN):
                    _product_block(
                        table, at, bases, first, tile_rows, row, outer, begin, length, j0,
                        BM, BN, BK, True, PRECISION, dtype,
                    )  # fmt: skip
        for begin in range(whole * BM, length, SMALL):
            for j0 in range(0, width, BN):
                if is_aligned:
                    _product_block(
                        table, at, bases, first, tile_rows, row, outer, begin, length, j0,
                        SMALL, BN, BK, True, PRECISION, dtype,
                    )  # fmt: skip
                else:
                    _product_block(
                        table, at, bases, first, tile_rows, row, outer, begin, length, j0,
                        SMALL, BN, BK, False, PRECISION, dtype,
                    )  # fmt: skip


@triton.jit
def _sum_products(table, at, bases, first, tile_rows, live, ME: tl.constexpr, dtype: tl.constexpr):
    """Compute the step C[o, 0, w] = Σ_i A[o, i, w] B[o, i, w]."""
    flags = tl.load(table + at + 1)
    outer, inner, columns = _number(table, at + 2), _number(table, at + 3), _number(table, at + 4)
    a_view, b_view, c_view = at + 8, at + 8 + VIEW, at + 8 + 2 * VIEW
    a_inner, b_inner = _number(table, a_view + 6), _number(table, b_view + 6)
    padded = columns + _number(table, c_view + 9)
    total = live * outer * padded
    for e0 in range(0, total, ME):
        e = e0 + tl.arange(0, ME)
        t = _quotient(e, padded)
        w = e - t * padded
        r = _quotient(t, outer)
        o = t - r * outer
        mask = (e < total) & (w < columns)
        left = _view(table, a_view, bases, first, tile_rows, dtype)
        left = left + (
            r * _number(table, a_view + 4) + o * _number(table, a_view + 5) + w * _number(table, a_view + 7)
        )
        right = _view(table, b_view, bases, first, tile_rows, dtype)
        right = right + (
            r * _number(table, b_view + 4) + o * _number(table, b_view + 5) + w * _number(table, b_view + 7)
        )
        result = tl.zeros((ME,), dtype)
        for _i in range(inner):
            x = tl.load(left, mask=mask, other=0.0)
            if flags & HAS_B:
                x *= tl.load(right, mask=mask, other=0.0)
            result += x
            left += a_inner
            right += b_inner
        out = _view(table, c_view, bases, first, tile_rows, dtype)
        out = out + (r * _number(table, c_view + 4) + o * _number(table, c_view + 5) + w * _number(table, c_view + 7))
        tl.store(out, result, mask=e < total)


@triton.jit
def _pairs(
    table, at, bases, first, tile_rows, live,
    RB: tl.constexpr, CB: tl.constexpr, BW: tl.constexpr, PRECISION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Compute the step C[i, j, m] = Σ_w A[i, w] S[m, w] B[j, w], RB rows of the tile at a time.

    The arrays have unit column strides and are padded with zeros to a multiple of 16 bytes. In a congruence B = A, and
    only entries with j ≤ i are computed, each stored at (i, j) and (j, i). A contraction has no S and one m.
    """
    flags = tl.load(table + at + 1)
    count, height, width = _number(table, at + 2), _number(table, at + 3), _number(table, at + 4)
    lanes: tl.constexpr = 128 // dtype.primitive_bitwidth
    depth = (_number(table, at + 5) + lanes - 1) // lanes * lanes
    a_view, b_view, s_view, c_view = at + 8, at + 8 + VIEW, at + 8 + 2 * VIEW, at + 8 + 3 * VIEW
    a = _view(table, a_view, bases, first, tile_rows, dtype, True)
    b = _view(table, b_view, bases, first, tile_rows, dtype, True)
    s = _view(table, s_view, bases, first, tile_rows, dtype, True)
    c = _view(table, c_view, bases, first, tile_rows, dtype)
    a_row, a_inner = _whole(_number(table, a_view + 4), dtype), _whole(_number(table, a_view + 6), dtype)
    b_row, b_inner = _whole(_number(table, b_view + 4), dtype), _whole(_number(table, b_view + 6), dtype)
    s_row, s_inner = _whole(_number(table, s_view + 4), dtype), _whole(_number(table, s_view + 6), dtype)
    c_row, c_i = _number(table, c_view + 4), _number(table, c_view + 5)
    c_j, c_m = _number(table, c_view + 6), _number(table, c_view + 7)
    padding = _number(table, c_view + 9)
    is_symmetric = (flags & IS_SYMMETRIC) != 0
    # The padding after the columns is written too: further m in a congruence, further j in a contraction.
    stored = width + tl.where(is_symmetric, 0, padding)
    for m in range(count + tl.where(is_symmetric, padding, 0)):
        # The padding gets empty sums, which are zero.
        length = tl.where(m < count, depth, 0)
        for r0 in range(0, live, RB):
            r = r0 + tl.arange(0, RB)
            rows = (r < live)[:, None, None]
            w = tl.arange(0, BW)
            factor = _whole(m * s_inner, dtype) + (r * s_row)[:, None, None] + w[None, None, :]
            for i0 in range(0, height, CB):
                i = i0 + tl.arange(0, CB)
                down = (i < height)[None, :, None]
                left = (r * a_row)[:, None, None] + (i * a_inner)[None, :, None] + w[None, None, :]
                for j0 in range(0, tl.where(is_symmetric, i0 + 1, stored), CB):
                    j = j0 + tl.arange(0, CB)
                    across = (j < width)[None, :, None]
                    right = (r * b_row)[:, None, None] + (j * b_inner)[None, :, None] + w[None, None, :]
                    is_same = is_symmetric & (i0 == j0)
                    total = tl.zeros((RB, CB, CB), dtype)
                    for w0 in range(0, length, BW):
                        inside = rows & (w < length - w0)[None, None, :]
                        x = tl.load(a + (left + w0), mask=inside & down, other=0.0)
                        y = x
                        if is_same == 0:
                            y = tl.load(b + (right + w0), mask=inside & across, other=0.0)
                        if is_symmetric:
                            x *= tl.load(s + (factor + w0), mask=inside, other=0.0)
                        y = tl.permute(y, (0, 2, 1))
                        total = tl.dot(x, y, total, input_precision=PRECISION, out_dtype=dtype)
                    row, at_i, at_j = (r * c_row)[:, None, None], i[None, :, None], j[None, None, :]
                    slack = tl.where(is_symmetric, 0, stored)
                    mask = rows & (at_i < height) & (at_j < stored) & (at_j <= at_i + slack)
                    place = c + m * c_m + row
                    tl.store(place + (at_i * c_i + at_j * c_j), total, mask=mask)
                    if is_symmetric:
                        tl.store(place + (at_j * c_i + at_i * c_j), total, mask=mask)


@triton.jit
def _apply(op, a, b, condition):
    """Return the result of a pointwise primitive, given by its number in ``gpu_table.OPCODES``."""
    result = a
    if op < 8:
        if op < 4:
            if op == 2:
                result = a * b
            elif op == 3:
                result = a + b
        elif op == 4:
            result = a - b
        elif op == 5:
            result = gpu_math.divide(a, b)
        elif op == 6:
            result = -a
        else:
            result = tl.abs(a)
    elif op < 16:
        if op < 12:
            if op == 8:
                result = tl.where(condition != 0.0, a, b)
            elif op == 9:
                result = (a > b).to(a.dtype)
            elif op == 10:
                result = (a >= b).to(a.dtype)
            else:
                result = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
        elif op == 12:
            result = tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
        elif op == 13:
            result = gpu_math.square_root(a)
        elif op == 14:
            result = gpu_math.exp(a)
        else:
            result = gpu_math.expm1(a)
    elif op < 20:
        if op == 16:
            result = gpu_math.log(a)
        elif op == 17:
            result = gpu_math.log1p(a)
        elif op == 18:
            result = gpu_math.tanh(a)
        else:
            result = gpu_math.sigmoid(a)
    elif op < 23:
        if op == 20:
            result = gpu_math.erf(a)
        elif op == 21:
            result = gpu_math.ndtr(a)
        else:
            result = gpu_math.atan(a)
    elif op == 23:
        result = tl.sin(a)
    elif op == 24:
        result = tl.cos(a)
    return result


@triton.jit
def _map(table, at, bases, spill, first, tile_rows, live, ME: tl.constexpr, dtype: tl.constexpr):
    """Run a map's instructions on blocks of entries.

    An instruction: 0 operation, 1 register of the result, 2 and 3 registers of the operands, 4 a number (bits of a
    float64), 5 … a view. Operations 0 and 1 load and store an entry of a view, 25 and 26 load and store a spilled
    register; 27 sets the condition of the next ``where``.
    """
    flags = tl.load(table + at + 1)
    outer, inner = _number(table, at + 2), _number(table, at + 3)
    columns, count, padded = _number(table, at + 4), _number(table, at + 5), _number(table, at + 9)
    code = tl.load(table + at + 8)
    total = live * outer * inner * padded
    for e0 in range(0, total, ME):
        local = tl.arange(0, ME)
        e = e0 + local
        t = _quotient(e, padded)
        w = e - t * padded
        i = t * 0
        o = i
        r = t
        if (flags & IS_FLAT) == 0:
            t = _quotient(r, inner)
            i = r - t * inner
            r = _quotient(t, outer)
            o = t - r * outer
        is_entry = (e < total) & (w < columns)
        r0 = tl.zeros((ME,), dtype)
        r1, r2, r3, r4, r5, r6, r7, condition = r0, r0, r0, r0, r0, r0, r0, r0
        # The next instruction is read while one is computed; the table has a spare one after the last.
        next_op, next_out = _number(table, code), _number(table, code + 1)
        next_first, next_second = _number(table, code + 2), _number(table, code + 3)
        next_number = tl.load(table + code + 4)
        for step in range(count):
            here = code + step * CODE
            op, out, first_operand, second_operand = next_op, next_out, next_first, next_second
            number = next_number.to(tl.float64, bitcast=True).to(dtype)
            next_op, next_out = _number(table, here + CODE), _number(table, here + CODE + 1)
            next_first, next_second = _number(table, here + CODE + 2), _number(table, here + CODE + 3)
            next_number = tl.load(table + here + CODE + 4)
            a, b = r0, r0
            a = tl.where(first_operand == 1, r1, a)
            b = tl.where(second_operand == 1, r1, b)
            a = tl.where(first_operand == 2, r2, a)
            b = tl.where(second_operand == 2, r2, b)
            a = tl.where(first_operand == 3, r3, a)
            b = tl.where(second_operand == 3, r3, b)
            a = tl.where(first_operand == 4, r4, a)
            b = tl.where(second_operand == 4, r4, b)
            a = tl.where(first_operand == 5, r5, a)
            b = tl.where(second_operand == 5, r5, b)
            a = tl.where(first_operand == 6, r6, a)
            b = tl.where(second_operand == 6, r6, b)
            a = tl.where(first_operand == 7, r7, a)
            b = tl.where(second_operand == 7, r7, b)
            a = tl.where(first_operand == REGISTERS, number, a)
            b = tl.where(second_operand == REGISTERS, number, b)
            result = a
            if op < 2:
                view = _view(table, here + 5, bases, first, tile_rows, dtype)
                offset = r * _number(table, here + 9) + w * _number(table, here + 12)
                if (flags & IS_FLAT) == 0:
                    offset += o * _number(table, here + 10) + i * _number(table, here + 11)
                if op == 0:
                    result = tl.load(view + offset, mask=is_entry, other=0.0)
                else:
                    written = columns + _number(table, here + 14)
                    tl.store(view + offset, tl.where(w < columns, a, 0.0), mask=(e < total) & (w < written))
            elif op < 25:
                result = _apply(op, a, b, condition)
            elif op < 27:
                place = spill + tl.load(table + here + 5) * ME + local
                tl.debug_barrier()
                if op == 25:
                    result = tl.load(place)
                else:
                    tl.store(place, a)
            else:
                condition = a
            r0 = tl.where(out == 0, result, r0)
            r1 = tl.where(out == 1, result, r1)
            r2 = tl.where(out == 2, result, r2)
            r3 = tl.where(out == 3, result, r3)
            r4 = tl.where(out == 4, result, r4)
            r5 = tl.where(out == 5, result, r5)
            r6 = tl.where(out == 6, result, r6)
            r7 = tl.where(out == 7, result, r7)


@triton.jit
def run_table(
    table, once, steps, rows, tile_rows, memory, instance_bytes, shared_offset, spill_offset,
    addresses,
    DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SMALL: tl.constexpr, BK: tl.constexpr, ME: tl.constexpr,
    RB: tl.constexpr, CB: tl.constexpr, BW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run a program on all tiles of a call.

    Args:
        table: Address of the table: first the steps that run once, then the steps of each tile.
        once: Number of steps that run once.
        steps: Number of steps of each tile.
        rows: Rows of the call.
        tile_rows: Rows of a tile.
        memory: Address of the instances' memory.
        instance_bytes: Bytes of memory per instance: base addresses, TILE, SHARED and spilled registers, in this order.
        shared_offset: Byte offset of SHARED in an instance's memory.
        spill_offset: Byte offset of the spilled registers.
        addresses: Addresses of the call's inputs and outputs.
        DTYPE: Type of all numbers.
        BM, BN, BK: Rows, columns and depth of a block of a product.
        SMALL: Rows or columns of a block where few remain.
        ME: Entries of a block of a map.
        RB, CB, BW: Rows of the tile, entries per side and depth of a block of a congruence or contraction.
        PRECISION: Input precision of ``tl.dot`` in products.
    """
    table = table.to(tl.pointer_type(tl.int64))
    own = memory + tl.program_id(0).to(tl.int64) * instance_bytes
    bases = own.to(tl.pointer_type(tl.int64))
    tl.store(bases + CONSTANT, tl.zeros((), tl.int64))
    tl.store(bases + TILE, own + BASES_BYTES)
    tl.store(bases + SHARED, own + shared_offset)
    for slot in tl.static_range(len(addresses)):
        tl.store(bases + CALL + slot, addresses[slot].to(tl.int64))
    spill = (own + spill_offset).to(tl.pointer_type(DTYPE))
    tl.debug_barrier()
    tiles = (rows + tile_rows - 1) // tile_rows
    own_tiles = (tiles - tl.program_id(0) + tl.num_programs(0) - 1) // tl.num_programs(0)
    # Turn −1 runs the steps that run once.
    for turn in range(-1, own_tiles):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        first = tl.where(turn < 0, 0, tile.to(tl.int64) * tile_rows)
        for index in range(tl.where(turn < 0, 0, once), tl.where(turn < 0, once, once + steps)):
            at = index * STEP
            kind = tl.load(table + at)
            live = tl.where(turn < 0, tile_rows, tl.minimum(tile_rows, rows - first)).to(tl.int32)
            live = tl.where(tl.load(table + at + 6) != 0, 1, live)
            if kind == PRODUCT:
                _product(table, at, bases, first, tile_rows, live, BM, BN, SMALL, BK, PRECISION, DTYPE)
            elif kind == MAP:
                _map(table, at, bases, spill, first, tile_rows, live, ME, DTYPE)
            elif kind == SUM_PRODUCTS:
                _sum_products(table, at, bases, first, tile_rows, live, ME, DTYPE)
            else:
                _pairs(table, at, bases, first, tile_rows, live, RB, CB, BW, PRECISION, DTYPE)
            tl.debug_barrier()
