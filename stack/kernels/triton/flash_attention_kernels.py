"""The tiles of flash attention.

B batch, N query heads, K key/value heads, G = N/K, T queries, S keys, H head_dim; M queries and J
keys of a tile, E head_dim padded to a power of two, R rows of either kind

A query at absolute position p attends to keys s with low(p) <= s <= p. Tiles of keys that are
masked for all queries of a tile are not visited; those visible to all need no mask. Scores are kept
in base 2, since the hardware has exp2. The backward recomputes the weights from the logarithm of
the row sums. Each program owns what it writes, so the sum over a group's heads has a fixed order
and needs no atomics.
Source: FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2.
"""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _place(length, heads, TILE: tl.constexpr):
    """This program's tile, tiles per head, row of the batch and head.
    Tiles of one head are neighbours, since they share keys.
    """
    tiles = tl.cdiv(length, TILE)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    return tile, tiles, tl.cast(head // heads, tl.int64), tl.cast(head % heads, tl.int64)


@triton.jit
def _rows(
    base, first, row_R, n_rows, stride, e_E, H: tl.constexpr, E: tl.constexpr, BOUNDED: tl.constexpr
):
    """Rows `first + row_R` of a (rows, H) matrix with any strides, zero beyond H and, if BOUNDED,
    from row `n_rows` on.
    """
    at_RE = (
        base
        + tl.cast(first, tl.int64) * stride[2]
        + row_R[:, None] * stride[2]
        + e_E[None, :] * stride[3]
    )
    if BOUNDED:
        return tl.load(
            at_RE, mask=(first + row_R[:, None] < n_rows) & (e_E[None, :] < H), other=0.0
        )
    if H != E:
        return tl.load(at_RE, mask=e_E[None, :] < H, other=0.0)
    return tl.load(at_RE)


@triton.jit
def _store_rows(base, x_RE, first, row_R, n_rows, stride, e_E, H: tl.constexpr):
    """Write rows `first + row_R` below `n_rows`."""
    at_RE = (
        base
        + tl.cast(first, tl.int64) * stride[2]
        + row_R[:, None] * stride[2]
        + e_E[None, :] * stride[3]
    )
    tl.store(
        at_RE,
        x_RE.to(base.dtype.element_ty),
        mask=(first + row_R[:, None] < n_rows) & (e_E[None, :] < H),
    )


@triton.jit
def _first_keys(start, b, stride, p_M, window):
    """The first key that each position may see."""
    low_M = tl.zeros_like(p_M)
    if start is not None:
        low_M = tl.load(start + b * stride[0] + p_M * stride[1]).to(tl.int32)
    if window is not None:
        low_M = tl.maximum(low_M, p_M - window + 1)
    return low_M


@triton.jit
def _key_range(low_M, i0, T, S, M: tl.constexpr, J: tl.constexpr):
    """Keys of a tile of queries: first, first of the tiles seen by all, one past these,
    one past the last.
    """
    first = tl.min(low_M) // J * J
    last = tl.minimum(i0 + M, T) + S - T
    whole_lo = (tl.max(low_M) + J - 1) // J * J
    whole_hi = tl.maximum((i0 + S - T + 1) // J * J, whole_lo)
    return first, tl.minimum(whole_lo, last), tl.minimum(whole_hi, last), last


@triton.jit
def _attend(
    acc_ME, top_M, sum_M, q_ME, k, v, k_stride, v_stride, first, last, low_M, p_M, S, base2_scale,
    H: tl.constexpr, E: tl.constexpr, J: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Continue the running maximum, the running sum and the unscaled output over keys `first` to
    `last`.
    """
    e_E, j_J = tl.arange(0, E), tl.arange(0, J)
    for s0 in range(first, last, J):
        k_JE = _rows(k, s0, j_J, S, k_stride, e_E, H, E, MASKED)
        x_MJ = tl.dot(q_ME, tl.trans(k_JE), input_precision=PRECISION) * base2_scale
        if MASKED:
            s_J = s0 + j_J
            x_MJ = tl.where(
                (s_J[None, :] >= low_M[:, None]) & (s_J[None, :] <= p_M[:, None]),
                x_MJ,
                float("-inf"),
            )
        new_M = tl.maximum(top_M, tl.max(x_MJ, 1))
        # before its first key a row has the maximum -inf, and -inf minus -inf is NaN
        shift_M = tl.where(new_M == float("-inf"), 0.0, new_M) if MASKED else new_M
        weight_MJ = tl.exp2(x_MJ - shift_M[:, None])
        keep_M = tl.exp2(top_M - shift_M)
        sum_M = sum_M * keep_M + tl.sum(weight_MJ, 1)
        v_JE = _rows(v, s0, j_J, S, v_stride, e_E, H, E, MASKED)
        acc_ME = tl.dot(
            weight_MJ.to(v_JE.dtype), v_JE, acc_ME * keep_M[:, None], input_precision=PRECISION
        )
        top_M = new_M
    return acc_ME, top_M, sum_M


@triton.jit
def forward(
    q, k, v, out, lse, start, q_stride, k_stride, v_stride, out_stride, start_stride, N, G, T, S,
    window, scale,
    H: tl.constexpr, E: tl.constexpr, M: tl.constexpr, J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. The last tiles see most keys and come first."""
    tile, tiles, b, n = _place(T, N, M)
    i0 = (tiles - 1 - tile) * M
    q += b * q_stride[0] + n * q_stride[1]
    k += b * k_stride[0] + n // G * k_stride[1]
    v += b * v_stride[0] + n // G * v_stride[1]
    i_M, e_E = tl.arange(0, M), tl.arange(0, E)
    p_M = tl.minimum(i0 + i_M, T - 1) + S - T
    low_M = _first_keys(start, b, start_stride, p_M, window)
    first, whole_lo, whole_hi, last = _key_range(low_M, i0, T, S, M, J)
    q_ME = _rows(q, i0, i_M, T, q_stride, e_E, H, E, True)
    acc_ME, sum_M = tl.zeros((M, E), tl.float32), tl.zeros((M,), tl.float32)
    top_M = tl.full((M,), float("-inf"), tl.float32)
    base2_scale = scale * LOG2_E
    acc_ME, top_M, sum_M = _attend(
        acc_ME, top_M, sum_M, q_ME, k, v, k_stride, v_stride, first, whole_lo, low_M, p_M, S,
        base2_scale,
        H, E, J, PRECISION, True,
    )  # fmt: skip
    acc_ME, top_M, sum_M = _attend(
        acc_ME, top_M, sum_M, q_ME, k, v, k_stride, v_stride, whole_lo, whole_hi, low_M, p_M, S,
        base2_scale,
        H, E, J, PRECISION, False,
    )  # fmt: skip
    acc_ME, top_M, sum_M = _attend(
        acc_ME, top_M, sum_M, q_ME, k, v, k_stride, v_stride, whole_hi, last, low_M, p_M, S,
        base2_scale,
        H, E, J, PRECISION, True,
    )  # fmt: skip
    _store_rows(
        out + b * out_stride[0] + n * out_stride[1],
        acc_ME / sum_M[:, None],
        i0,
        i_M,
        T,
        out_stride,
        e_E,
        H,
    )
    tl.store(lse + (b * N + n) * T + i0 + i_M, top_M + tl.log2(sum_M), mask=i0 + i_M < T)


@triton.jit
def row_delta(
    out, grad, delta, out_stride, grad_stride, N, T,
    H: tl.constexpr, E: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """sum over features of output · its gradient, per query: what every
    weight's gradient is reduced by.
    """
    tile, _, b, n = _place(T, N, M)
    i0, i_M, e_E = tile * M, tl.arange(0, M), tl.arange(0, E)
    out_ME = _rows(
        out + b * out_stride[0] + n * out_stride[1], i0, i_M, T, out_stride, e_E, H, E, True
    ).to(tl.float32)
    grad_ME = _rows(
        grad + b * grad_stride[0] + n * grad_stride[1], i0, i_M, T, grad_stride, e_E, H, E, True
    ).to(tl.float32)
    tl.store(delta + (b * N + n) * T + i0 + i_M, tl.sum(out_ME * grad_ME, 1), mask=i0 + i_M < T)


@triton.jit
def _descend(
    acc_ME, q_ME, grad_ME, lse_M, delta_M, k, v, k_stride, v_stride, first, last, low_M, p_M, S,
    base2_scale,
    H: tl.constexpr, E: tl.constexpr, J: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add what keys `first` to `last` give to the gradient of a tile of queries,
    before the scale.
    """
    e_E, j_J = tl.arange(0, E), tl.arange(0, J)
    for s0 in range(first, last, J):
        k_JE = _rows(k, s0, j_J, S, k_stride, e_E, H, E, MASKED)
        v_JE = _rows(v, s0, j_J, S, v_stride, e_E, H, E, MASKED)
        weight_MJ = tl.exp2(
            tl.dot(q_ME, tl.trans(k_JE), input_precision=PRECISION) * base2_scale - lse_M[:, None]
        )
        if MASKED:
            s_J = s0 + j_J
            weight_MJ = tl.where(
                (s_J[None, :] >= low_M[:, None]) & (s_J[None, :] <= p_M[:, None]), weight_MJ, 0.0
            )
        slope_MJ = weight_MJ * (
            tl.dot(grad_ME, tl.trans(v_JE), input_precision=PRECISION) - delta_M[:, None]
        )
        acc_ME = tl.dot(slope_MJ.to(k_JE.dtype), k_JE, acc_ME, input_precision=PRECISION)
    return acc_ME


@triton.jit
def backward_q(
    q, k, v, grad, lse, delta, start, stop, dq, q_stride, k_stride, v_stride, grad_stride,
    start_stride, dq_stride,
    N, G, T, S, window, scale,
    H: tl.constexpr, E: tl.constexpr, M: tl.constexpr, J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of queries of one head."""
    tile, tiles, b, n = _place(T, N, M)
    i0 = (tiles - 1 - tile) * M
    k += b * k_stride[0] + n // G * k_stride[1]
    v += b * v_stride[0] + n // G * v_stride[1]
    i_M, e_E = tl.arange(0, M), tl.arange(0, E)
    p_M = tl.minimum(i0 + i_M, T - 1) + S - T
    low_M = _first_keys(start, b, start_stride, p_M, window)
    first, whole_lo, whole_hi, last = _key_range(low_M, i0, T, S, M, J)
    q_ME = _rows(q + b * q_stride[0] + n * q_stride[1], i0, i_M, T, q_stride, e_E, H, E, True)
    grad_ME = _rows(
        grad + b * grad_stride[0] + n * grad_stride[1], i0, i_M, T, grad_stride, e_E, H, E, True
    )
    lse_M = tl.load(lse + (b * N + n) * T + i0 + i_M, mask=i0 + i_M < T, other=0.0)
    delta_M = tl.load(delta + (b * N + n) * T + i0 + i_M, mask=i0 + i_M < T, other=0.0)
    acc_ME = tl.zeros((M, E), tl.float32)
    base2_scale = scale * LOG2_E
    acc_ME = _descend(
        acc_ME, q_ME, grad_ME, lse_M, delta_M, k, v, k_stride, v_stride, first, whole_lo, low_M,
        p_M, S, base2_scale,
        H, E, J, PRECISION, True,
    )  # fmt: skip
    acc_ME = _descend(
        acc_ME, q_ME, grad_ME, lse_M, delta_M, k, v, k_stride, v_stride, whole_lo, whole_hi, low_M,
        p_M, S, base2_scale,
        H, E, J, PRECISION, False,
    )  # fmt: skip
    acc_ME = _descend(
        acc_ME, q_ME, grad_ME, lse_M, delta_M, k, v, k_stride, v_stride, whole_hi, last, low_M, p_M,
        S, base2_scale,
        H, E, J, PRECISION, True,
    )  # fmt: skip
    _store_rows(
        dq + b * dq_stride[0] + n * dq_stride[1], acc_ME * scale, i0, i_M, T, dq_stride, e_E, H
    )


@triton.jit
def _gather(
    dk_JE, dv_JE, k_JE, v_JE, q, grad, lse, delta, start, q_stride, grad_stride, start_stride, b,
    first, last, s_J,
    T, S, window, base2_scale,
    H: tl.constexpr, E: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add what queries `first` to `last` of one head give to the gradients of
    a tile of keys and values.
    """
    i_M, e_E = tl.arange(0, M), tl.arange(0, E)
    for i0 in range(first, last, M):
        q_ME = _rows(q, i0, i_M, T, q_stride, e_E, H, E, MASKED)
        grad_ME = _rows(grad, i0, i_M, T, grad_stride, e_E, H, E, MASKED)
        # a row beyond T weighs every key 1 and has gradient 0: it adds nothing
        lse_M = tl.load(lse + i0 + i_M, mask=i0 + i_M < T, other=0.0)
        delta_M = tl.load(delta + i0 + i_M, mask=i0 + i_M < T, other=0.0)
        weight_JM = tl.exp2(
            tl.dot(k_JE, tl.trans(q_ME), input_precision=PRECISION) * base2_scale - lse_M[None, :]
        )
        if MASKED:
            p_M = tl.minimum(i0 + i_M, T - 1) + S - T
            low_M = _first_keys(start, b, start_stride, p_M, window)
            weight_JM = tl.where(
                (s_J[:, None] >= low_M[None, :]) & (s_J[:, None] <= p_M[None, :]), weight_JM, 0.0
            )
        dv_JE = tl.dot(weight_JM.to(grad_ME.dtype), grad_ME, dv_JE, input_precision=PRECISION)
        slope_JM = weight_JM * (
            tl.dot(v_JE, tl.trans(grad_ME), input_precision=PRECISION) - delta_M[None, :]
        )
        dk_JE = tl.dot(slope_JM.to(q_ME.dtype), q_ME, dk_JE, input_precision=PRECISION)
    return dk_JE, dv_JE


@triton.jit
def backward_kv(
    q, k, v, grad, lse, delta, start, stop, dk, dv, q_stride, k_stride, v_stride, grad_stride,
    start_stride, dk_stride, dv_stride,
    N, G, T, S, window, scale,
    H: tl.constexpr, E: tl.constexpr, M: tl.constexpr, J: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values, summed over the heads that read them,
    always in the same order.
    """
    tile, _, b, m = _place(S, N // G, J)
    s0 = tile * J
    j_J, e_E = tl.arange(0, J), tl.arange(0, E)
    k_JE = _rows(k + b * k_stride[0] + m * k_stride[1], s0, j_J, S, k_stride, e_E, H, E, True)
    v_JE = _rows(v + b * v_stride[0] + m * v_stride[1], s0, j_J, S, v_stride, e_E, H, E, True)
    dk_JE, dv_JE = tl.zeros((J, E), tl.float32), tl.zeros((J, E), tl.float32)
    base2_scale = scale * LOG2_E
    s_J, newest = s0 + j_J, tl.minimum(s0 + J, S) - 1
    end, whole_end = S, S
    if window is not None:
        end = tl.minimum(end, newest + window)
        whole_end = tl.minimum(whole_end, s0 + window)
    if start is not None:
        end = tl.minimum(end, tl.load(stop + b * S + newest))
        whole_end = 0  # where documents begin is only known query by query
    # from positions to indices of queries, and to whole tiles
    first = tl.maximum(s0 - (S - T), 0) // M * M
    last = end - (S - T)
    whole_lo = tl.minimum(
        (tl.maximum(newest - (S - T), 0) + M - 1) // M * M, tl.maximum(last, first)
    )
    whole_hi = tl.maximum((whole_end - (S - T)) // M * M, whole_lo)
    for g in range(0, G):
        n = m * G + g
        q_n, grad_n = (
            q + b * q_stride[0] + n * q_stride[1],
            grad + b * grad_stride[0] + n * grad_stride[1],
        )
        lse_n, delta_n = lse + (b * N + n) * T, delta + (b * N + n) * T
        dk_JE, dv_JE = _gather(
            dk_JE, dv_JE, k_JE, v_JE, q_n, grad_n, lse_n, delta_n, start, q_stride, grad_stride,
            start_stride, b, first, whole_lo, s_J,
            T, S, window, base2_scale, H, E, M, PRECISION, True,
        )  # fmt: skip
        dk_JE, dv_JE = _gather(
            dk_JE, dv_JE, k_JE, v_JE, q_n, grad_n, lse_n, delta_n, start, q_stride, grad_stride,
            start_stride, b, whole_lo, whole_hi, s_J,
            T, S, window, base2_scale, H, E, M, PRECISION, False,
        )  # fmt: skip
        dk_JE, dv_JE = _gather(
            dk_JE, dv_JE, k_JE, v_JE, q_n, grad_n, lse_n, delta_n, start, q_stride, grad_stride,
            start_stride, b, whole_hi, last, s_J,
            T, S, window, base2_scale, H, E, M, PRECISION, True,
        )  # fmt: skip
    _store_rows(
        dk + b * dk_stride[0] + m * dk_stride[1], dk_JE * scale, s0, j_J, S, dk_stride, e_E, H
    )
    _store_rows(dv + b * dv_stride[0] + m * dv_stride[1], dv_JE, s0, j_J, S, dv_stride, e_E, H)
