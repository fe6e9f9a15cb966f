"""The Triton kernels: what one program on the GPU computes. Importing this file needs Triton.

Each is a grid of programs that stay and take one tile after the other; how many tiles there are, and whose, they read
from the offsets in the GPU's memory, so no count of rows ever travels to the host. Sizes that a model fixes are
compile-time constants; the number of rows, which changes at every call, is not.

ScatterMoE (Tan et al., "Scattered Mixture-of-Experts Implementation") fuses gather and scatter into the matmul too; the
order of tiles within an expert is that of Triton's tutorial on matrix multiplication.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows and slots are counted anew at every call: code that depends on whether 16 divides them would be compiled twice.
_CHANGING = ["num_rows", "num_slots", "rows_bucket"]


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``. "widened" is for Triton's interpreter, which knows no products of bfloat16: it multiplies their
    bits (Triton's issue 11584)."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def gelu(x):
    """The exact one."""
    return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """``(1 + tanh(u)) / 2`` is ``sigmoid(2u)``."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr):
    """A named activation of float32 tiles; those that are not gated read only ``gate``."""
    if ACTIVATION == "swiglu":
        h = gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "geglu":
        h = gelu(gate) * up
    elif ACTIVATION == "geglu_tanh":
        h = gelu_tanh(gate) * up
    elif ACTIVATION == "gelu":
        h = gelu(gate)
    elif ACTIVATION == "gelu_tanh":
        h = gelu_tanh(gate)
    elif ACTIVATION == "relu":
        h = tl.where(gate < 0.0, 0.0, gate)  # a maximum would turn NaN into 0
    else:
        tl.static_assert(ACTIVATION == "", "unknown activation")
        h = gate
    return h


@triton.jit
def tile_ends(offsets_ptr, num_rows, COLUMN_TILES: tl.constexpr, E: tl.constexpr, TAIL: tl.constexpr,
              PADDED_E: tl.constexpr, BLOCK_ROW: tl.constexpr):  # fmt: skip
    """For the experts 0 to E - 1, and E, which stands for the rows that belong to nobody: first row, row that follows
    the last, and the tile that follows the last, ``[PADDED_E]`` each. Without ``TAIL`` expert E has no tiles."""
    experts = tl.arange(0, PADDED_E)
    starts = tl.load(offsets_ptr + experts - 1, mask=(experts > 0) & (experts <= E), other=0)
    ends = tl.load(offsets_ptr + experts, mask=experts < E, other=num_rows)
    tiles = (ends - starts + (BLOCK_ROW - 1)) // BLOCK_ROW * COLUMN_TILES
    tiles = tl.where(experts < (E + 1 if TAIL else E), tiles, 0)
    return starts, ends, tl.cumsum(tiles, 0)


@triton.jit
def place_in_expert(place, row_tiles, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """Row tile and column tile of an expert's ``place``-th tile: GROUP row tiles for a column, then the next column, so
    that programs that run at the same time share rows and weights in the cache."""
    first = place // (GROUP * COLUMN_TILES) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    place = place % (GROUP * COLUMN_TILES)
    return first + place % height, place // height


@triton.jit(do_not_specialize=_CHANGING)
def grouped_matmul_kernel(
    a_ptr, w_ptr, bias_ptr, out_ptr, permutation_ptr, offsets_ptr, weights_ptr,
    num_rows, num_slots, rows_bucket,
    stride_a_row, stride_a_in, stride_w_expert, stride_w_in, stride_w_out, stride_bias_expert, stride_bias_out,
    E: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, TOP_K: tl.constexpr, PADDED_E: tl.constexpr,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """``out[n] = activation(a[n] @ w[expert of n] + bias[expert of n])``, times the weight of its slot where there are
    weights; rows that belong to nobody give zeros.

    GATHER: ``a`` is ``[T, IN]``, read by the token of each row, zeros for padding; else ``[N, IN]``. SCATTER: ``out``
    is ``[T·K, OUT]``, written by slot (null slots are left alone); else ``[N, OUT]``. GATED: ``w`` has 2·OUT columns.
    ``rows_bucket`` and PROGRAMS are for the tuning alone.
    """
    COLUMN_TILES: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    starts, ends, last_tiles = tile_ends(offsets_ptr, num_rows, COLUMN_TILES, E, not SCATTER, PADDED_E, BLOCK_ROW)
    experts = tl.arange(0, PADDED_E)
    for tile in range(tl.program_id(0), tl.max(last_tiles, 0), tl.num_programs(0)):
        expert = tl.sum((last_tiles <= tile).to(tl.int32), 0)
        start = tl.sum(tl.where(experts == expert, starts, 0), 0)
        end = tl.sum(tl.where(experts == expert, ends, 0), 0)
        place = tile - tl.max(tl.where(experts < expert, last_tiles, 0), 0)
        row_tile, column_tile = place_in_expert(place, tl.cdiv(end - start, BLOCK_ROW), COLUMN_TILES, GROUP)
        rows = start + row_tile * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
        columns = column_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        read = rows < end
        if GATHER or SCATTER:
            slots = tl.load(permutation_ptr + rows, mask=read, other=0).to(tl.int64)
            slots = tl.where(read, slots, num_slots)
        if GATHER:
            read = slots < num_slots
            a_rows = slots // TOP_K
        else:
            a_rows = rows.to(tl.int64)

        # 64-bit offsets: E·IN·OUT, and N·IN, exceed 2^31 in models that exist.
        steps = tl.arange(0, BLOCK_IN)
        a_ptrs = a_ptr + a_rows[:, None] * stride_a_row + steps[None, :] * stride_a_in
        w_ptrs = w_ptr + expert.to(tl.int64) * stride_w_expert
        w_ptrs += steps[:, None] * stride_w_in + columns.to(tl.int64)[None, :] * stride_w_out
        up = tl.full((), OUT, tl.int64) * stride_w_out
        acc = tl.zeros((BLOCK_ROW, BLOCK_OUT), dtype=tl.float32)
        acc_up = acc
        depth = tl.where(expert < E, IN, 0)
        for step in range(0, depth, BLOCK_IN):
            a_mask = read[:, None]
            w_mask = (columns < OUT)[None, :]
            if IN % BLOCK_IN:
                a_mask = a_mask & (steps < IN - step)[None, :]
                w_mask = w_mask & (steps < IN - step)[:, None]
            a = tl.load(a_ptrs, mask=a_mask, other=0.0)
            acc = multiply(a, tl.load(w_ptrs, mask=w_mask, other=0.0), acc, PRECISION)
            if GATED:
                acc_up = multiply(a, tl.load(w_ptrs + up, mask=w_mask, other=0.0), acc_up, PRECISION)
            a_ptrs += BLOCK_IN * stride_a_in
            w_ptrs += BLOCK_IN * stride_w_in

        if bias_ptr is not None:
            bias_ptrs = bias_ptr + expert.to(tl.int64) * stride_bias_expert + columns * stride_bias_out
            bias_mask = (columns < OUT) & (expert < E)
            acc += tl.load(bias_ptrs, mask=bias_mask, other=0.0).to(tl.float32)[None, :]
            if GATED:
                acc_up += tl.load(bias_ptrs + OUT * stride_bias_out, mask=bias_mask, other=0.0).to(tl.float32)[None, :]
        acc = activate(acc, acc_up, ACTIVATION)
        if weights_ptr is not None:
            acc *= tl.load(weights_ptr + slots, mask=slots < num_slots, other=0.0).to(tl.float32)[:, None]
        if SCATTER:
            out_rows = slots
            written = slots < num_slots
        else:
            out_rows = rows.to(tl.int64)
            written = rows < end
        out_ptrs = out_ptr + out_rows[:, None] * OUT + columns[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=written[:, None] & (columns < OUT)[None, :])


@triton.jit(do_not_specialize=_CHANGING)
def grouped_outer_kernel(
    a_ptr, b_ptr, out_ptr, permutation_ptr, offsets_ptr,
    num_slots, rows_bucket,
    stride_a_row, stride_a_in, stride_b_row, stride_b_out, stride_out_expert, stride_out_in, stride_out_out,
    E: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, TOP_K: tl.constexpr,
    GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """``out[e] = sum over the rows n of expert e of a[n] ⊗ b[n]``: ``[E, IN, OUT]``, zeros for an expert without rows.

    The operand that a GATHER names is read by the token of each row; padding rows add nothing.
    """
    OUT_TILES: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    TILES: tl.constexpr = (IN + BLOCK_IN - 1) // BLOCK_IN * OUT_TILES
    for tile in range(tl.program_id(0), E * TILES, tl.num_programs(0)):
        expert = tile // TILES
        ins = tile % TILES // OUT_TILES * BLOCK_IN + tl.arange(0, BLOCK_IN)
        outs = tile % OUT_TILES * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
        end = tl.load(offsets_ptr + expert)
        acc = tl.zeros((BLOCK_IN, BLOCK_OUT), dtype=tl.float32)
        for first in range(start, end, BLOCK_ROW):
            rows = first + tl.arange(0, BLOCK_ROW)
            slots = tl.load(permutation_ptr + rows, mask=rows < end, other=0).to(tl.int64)
            read = (rows < end) & (slots < num_slots)
            a_rows = slots // TOP_K if GATHER_A else rows.to(tl.int64)
            b_rows = slots // TOP_K if GATHER_B else rows.to(tl.int64)
            a_ptrs = a_ptr + a_rows[None, :] * stride_a_row + ins[:, None] * stride_a_in
            b_ptrs = b_ptr + b_rows[:, None] * stride_b_row + outs[None, :] * stride_b_out
            a = tl.load(a_ptrs, mask=read[None, :] & (ins < IN)[:, None], other=0.0)
            b = tl.load(b_ptrs, mask=read[:, None] & (outs < OUT)[None, :], other=0.0)
            acc = multiply(a, b, acc, PRECISION)
        out_ptrs = out_ptr + expert.to(tl.int64) * stride_out_expert
        out_ptrs += ins.to(tl.int64)[:, None] * stride_out_in + outs.to(tl.int64)[None, :] * stride_out_out
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(ins < IN)[:, None] & (outs < OUT)[None, :])


@triton.jit(do_not_specialize=_CHANGING)
def sum_slots_kernel(
    slots_ptr, inverse_ptr, out_ptr, num_rows,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``[T·K, WIDTH]`` to ``[T, WIDTH]``: the sum of each token's slots in float32, always in the same order. What the
    memory of a null slot holds is not read. The grid is tokens by blocks of columns."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in range(token * TOP_K, token * TOP_K + TOP_K):
        routed = tl.load(inverse_ptr + slot) < num_rows
        acc += tl.load(slots_ptr + slot * WIDTH + columns, mask=routed & (columns < WIDTH), other=0.0).to(tl.float32)
    tl.store(out_ptr + token * WIDTH + columns, acc.to(out_ptr.dtype.element_ty), mask=columns < WIDTH)


@triton.jit(do_not_specialize=_CHANGING)
def weigh_rows_kernel(
    grad_ptr, h_ptr, weights_ptr, permutation_ptr, offsets_ptr, grad_h_ptr, weighted_ptr, grad_weights_ptr,
    num_slots, stride_h_row, stride_h_column,
    E: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row n of weight w: ``grad_h[n] = w · grad[n]``, ``weighted[n] = w · h[n]``, and the gradient of w,
    ``grad[n] · h[n]``, at the slot of n. Zeros for padding and for rows that belong to nobody."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(permutation_ptr + row)
    routed = (slot < num_slots) & (row < tl.load(offsets_ptr + (E - 1)))
    weight = tl.load(weights_ptr + slot, mask=routed, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, WIDTH, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < WIDTH
        grad = tl.load(grad_ptr + row * WIDTH + columns, mask=inside & routed, other=0.0).to(tl.float32)
        h_ptrs = h_ptr + row * stride_h_row + columns.to(tl.int64) * stride_h_column
        h = tl.load(h_ptrs, mask=inside & routed, other=0.0).to(tl.float32)
        acc += grad * h
        tl.store(grad_h_ptr + row * WIDTH + columns, (grad * weight).to(grad_h_ptr.dtype.element_ty), mask=inside)
        tl.store(weighted_ptr + row * WIDTH + columns, (h * weight).to(weighted_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_weights_ptr + slot, tl.sum(acc, 0).to(grad_weights_ptr.dtype.element_ty), mask=routed)


@triton.jit(do_not_specialize=_CHANGING)
def sum_rows_kernel(
    a_ptr, out_ptr, permutation_ptr, offsets_ptr, weights_ptr,
    num_slots, stride_a_row, stride_a_column,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, GATHER: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``[E, WIDTH]``: the sum of each expert's rows, times the weights of their slots where there are weights, in
    float32. The grid is experts by blocks of columns; GATHER and padding as in :func:`grouped_outer_kernel`."""
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(start, end, BLOCK_ROW):
        rows = first + tl.arange(0, BLOCK_ROW)
        slots = tl.load(permutation_ptr + rows, mask=rows < end, other=0).to(tl.int64)
        read = (rows < end) & (slots < num_slots)
        a_rows = slots // TOP_K if GATHER else rows.to(tl.int64)
        a_ptrs = a_ptr + a_rows[:, None] * stride_a_row + columns[None, :] * stride_a_column
        a = tl.load(a_ptrs, mask=read[:, None] & (columns < WIDTH)[None, :], other=0.0).to(tl.float32)
        if weights_ptr is not None:
            a *= tl.load(weights_ptr + slots, mask=read, other=0.0).to(tl.float32)[:, None]
        acc += tl.sum(a, 0)
    out_ptrs = out_ptr + expert.to(tl.int64) * WIDTH + columns
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=columns < WIDTH)
