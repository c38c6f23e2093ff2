"""Query norm + RoPE, key norm + RoPE and value norm of Gemma 4's attention, in one launch.

Per token and head, with rstd = (mean(x^2) + eps)^-1/2 over the head dimension D:

    n = x * rstd * w
    y_i       = n_i * cos_i - n_{i+D/2} * sin_i                  for i < D/2
    y_{i+D/2} = n_{i+D/2} * cos_{i+D/2} + n_i * sin_{i+D/2}

for queries and keys (rotate-half RoPE on the two halves of the head), and v = x * rstd for values, which have neither
weight nor rotation. On layers that use keys as values, v comes from the raw, un-normed key projection. On global
layers only the first `rotary_dim / 2` pairs turn: for the others cos is 1 and sin is 0, and neither is loaded.
Everything inside is float32, rounded once.

The backward rotates the gradient back, then applies RMSNorm's: dx = rstd * (g - x * rstd * mean(g * x * rstd)) with
g = dn * w. It reads the pre-norm projections and recomputes rstd. Bytes per element (bf16): forward 4, backward 6.

Source: Su et al., "RoFormer" (2021); Zhang and Sennrich (2019); `Gemma4TextAttention` in transformers.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from fastgemma.kernels.backend import cdiv, check_dtype, jit, kernel, next_power_of_2, runs_kernel, tl
from fastgemma.kernels.launch import launch


@jit
def _load_pair(ptr, offsets, mask, HALF: tl.constexpr):
    """The two halves of a tile of heads, in float32."""
    first = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    return first, second


@jit
def _store_pair(ptr, offsets, first, second, mask, HALF: tl.constexpr):
    tl.store(ptr + offsets, first.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + offsets + HALF, second.to(ptr.dtype.element_ty), mask=mask)


@jit
def _rstd(first, second, eps, HALF: tl.constexpr):
    mean_square = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF)
    return (1.0 / tl.sqrt(mean_square + tl.cast(eps, tl.float32)))[:, None]


@jit
def _norm_bwd(g1, g2, x1, x2, rstd, HALF: tl.constexpr):
    """RMSNorm's input gradient from g = dn * w, for one head in halves."""
    h1 = x1 * rstd
    h2 = x2 * rstd
    projection = ((tl.sum(g1 * h1, axis=1) + tl.sum(g2 * h2, axis=1)) / (2 * HALF))[:, None]
    return (g1 - h1 * projection) * rstd, (g2 - h2 * projection) * rstd


@kernel
def _qk_norm_rope_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    q_row_stride,
    k_row_stride,
    v_row_stride,
    cos_batch_stride,
    cos_row_stride,
    n_rows,
    seq_len,
    num_heads,
    num_kv_heads,
    eps,
    ROTARY_HALF: tl.constexpr,
    V_FROM_K: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] & (cols < HALF)[None, :]
    if head < num_heads + num_kv_heads:
        is_query = head < num_heads
        local = tl.where(is_query, head, head - num_heads)
        heads = tl.where(is_query, num_heads, num_kv_heads)
        # One body for queries and keys: which of the two only chooses pointers.
        x_ptr = q_ptr if is_query else k_ptr
        weight_ptr = q_weight_ptr if is_query else k_weight_ptr
        out_ptr = q_out_ptr if is_query else k_out_ptr
        row_stride = tl.where(is_query, q_row_stride, k_row_stride)
        x1, x2 = _load_pair(x_ptr, rows[:, None] * row_stride + local * 2 * HALF + cols[None, :], mask, HALF)
        rstd = _rstd(x1, x2, eps, HALF)
        if V_FROM_K:  # noqa: SIM102 - a compile-time branch around a run-time one
            if head >= num_heads:
                v_out = (rows[:, None] * num_kv_heads + local) * (2 * HALF) + cols[None, :]
                _store_pair(v_out_ptr, v_out, x1 * rstd, x2 * rstd, mask, HALF)
        w1 = tl.load(weight_ptr + cols, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(weight_ptr + HALF + cols, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
        n1 = x1 * rstd * w1
        n2 = x2 * rstd * w2
        turning = (rows < n_rows)[:, None] & (cols < ROTARY_HALF)[None, :]
        angle = (rows // seq_len)[:, None] * cos_batch_stride + (rows % seq_len)[:, None] * cos_row_stride
        c1 = tl.load(cos_ptr + angle + cols[None, :], mask=turning, other=1.0).to(tl.float32)
        s1 = tl.load(sin_ptr + angle + cols[None, :], mask=turning, other=0.0).to(tl.float32)
        c2 = tl.load(cos_ptr + angle + HALF + cols[None, :], mask=turning, other=1.0).to(tl.float32)
        s2 = tl.load(sin_ptr + angle + HALF + cols[None, :], mask=turning, other=0.0).to(tl.float32)
        out = (rows[:, None] * heads + local) * (2 * HALF) + cols[None, :]
        _store_pair(out_ptr, out, n1 * c1 - n2 * s1, n2 * c2 + n1 * s2, mask, HALF)
    else:
        local = head - num_heads - num_kv_heads
        x1, x2 = _load_pair(v_ptr, rows[:, None] * v_row_stride + local * 2 * HALF + cols[None, :], mask, HALF)
        rstd = _rstd(x1, x2, eps, HALF)
        out = (rows[:, None] * num_kv_heads + local) * (2 * HALF) + cols[None, :]
        _store_pair(v_out_ptr, out, x1 * rstd, x2 * rstd, mask, HALF)


@kernel
def _qk_norm_rope_bwd_kernel(
    dq_out_ptr,
    dk_out_ptr,
    dv_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dweight_ptr,
    dq_out_batch_stride,
    dq_out_row_stride,
    dq_out_head_stride,
    dk_out_batch_stride,
    dk_out_row_stride,
    dk_out_head_stride,
    dv_out_batch_stride,
    dv_out_row_stride,
    dv_out_head_stride,
    q_row_stride,
    k_row_stride,
    v_row_stride,
    cos_batch_stride,
    cos_row_stride,
    n_rows,
    seq_len,
    num_heads,
    num_kv_heads,
    eps,
    ROTARY_HALF: tl.constexpr,
    V_FROM_K: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] & (cols < HALF)[None, :]
    batch = (rows // seq_len)[:, None]
    position = (rows % seq_len)[:, None]
    if head < num_heads + num_kv_heads:
        is_query = head < num_heads
        local = tl.where(is_query, head, head - num_heads)
        heads = tl.where(is_query, num_heads, num_kv_heads)
        x_ptr = q_ptr if is_query else k_ptr
        weight_ptr = q_weight_ptr if is_query else k_weight_ptr
        dy_ptr = dq_out_ptr if is_query else dk_out_ptr
        dx_ptr = dq_ptr if is_query else dk_ptr
        row_stride = tl.where(is_query, q_row_stride, k_row_stride)
        dy_batch_stride = tl.where(is_query, dq_out_batch_stride, dk_out_batch_stride)
        dy_row_stride = tl.where(is_query, dq_out_row_stride, dk_out_row_stride)
        dy_head_stride = tl.where(is_query, dq_out_head_stride, dk_out_head_stride)

        x1, x2 = _load_pair(x_ptr, rows[:, None] * row_stride + local * 2 * HALF + cols[None, :], mask, HALF)
        rstd = _rstd(x1, x2, eps, HALF)
        dy = batch * dy_batch_stride + position * dy_row_stride + local * dy_head_stride + cols[None, :]
        g1, g2 = _load_pair(dy_ptr, dy, mask, HALF)
        turning = (rows < n_rows)[:, None] & (cols < ROTARY_HALF)[None, :]
        angle = batch * cos_batch_stride + position * cos_row_stride
        c1 = tl.load(cos_ptr + angle + cols[None, :], mask=turning, other=1.0).to(tl.float32)
        s1 = tl.load(sin_ptr + angle + cols[None, :], mask=turning, other=0.0).to(tl.float32)
        c2 = tl.load(cos_ptr + angle + HALF + cols[None, :], mask=turning, other=1.0).to(tl.float32)
        s2 = tl.load(sin_ptr + angle + HALF + cols[None, :], mask=turning, other=0.0).to(tl.float32)
        dn1 = g1 * c1 + g2 * s2
        dn2 = g2 * c2 - g1 * s1
        if NEEDS_DWEIGHT:
            partial = (tl.program_id(0) * (num_heads + num_kv_heads) + head).to(tl.int64) * (2 * HALF) + cols
            tl.store(dweight_ptr + partial, tl.sum(dn1 * x1 * rstd, axis=0), mask=cols < HALF)
            tl.store(dweight_ptr + partial + HALF, tl.sum(dn2 * x2 * rstd, axis=0), mask=cols < HALF)
        w1 = tl.load(weight_ptr + cols, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(weight_ptr + HALF + cols, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
        dx1, dx2 = _norm_bwd(dn1 * w1, dn2 * w2, x1, x2, rstd, HALF)
        if V_FROM_K:  # noqa: SIM102 - a compile-time branch around a run-time one
            if head >= num_heads:
                # Keys and values share one projection here; their gradients meet in float32.
                dv = batch * dv_out_batch_stride + position * dv_out_row_stride + local * dv_out_head_stride
                g1, g2 = _load_pair(dv_out_ptr, dv + cols[None, :], mask, HALF)
                e1, e2 = _norm_bwd(g1, g2, x1, x2, rstd, HALF)
                dx1 += e1
                dx2 += e2
        out = (rows[:, None] * heads + local) * (2 * HALF) + cols[None, :]
        _store_pair(dx_ptr, out, dx1, dx2, mask, HALF)
    else:
        local = head - num_heads - num_kv_heads
        x1, x2 = _load_pair(v_ptr, rows[:, None] * v_row_stride + local * 2 * HALF + cols[None, :], mask, HALF)
        dv = batch * dv_out_batch_stride + position * dv_out_row_stride + local * dv_out_head_stride + cols[None, :]
        g1, g2 = _load_pair(dv_out_ptr, dv, mask, HALF)
        dx1, dx2 = _norm_bwd(g1, g2, x1, x2, _rstd(x1, x2, eps, HALF), HALF)
        out = (rows[:, None] * num_kv_heads + local) * (2 * HALF) + cols[None, :]
        _store_pair(dv_ptr, out, dx1, dx2, mask, HALF)


def _token_rows(x: torch.Tensor) -> torch.Tensor:
    """[B, S, heads * D] as [B * S, heads * D] with unit column stride, a view where possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cos, sin, q_weight, k_weight, head_dim, rotary_dim, v_from_k, eps):
        batch, seq_len = q.shape[:2]
        n_rows = batch * seq_len
        num_heads = q.shape[-1] // head_dim
        num_kv_heads = 0 if k is None else k.shape[-1] // head_dim
        cos, sin = _unit_stride(cos), _unit_stride(sin)
        q_weight = q_weight.contiguous()
        k_weight = None if k_weight is None else k_weight.contiguous()
        if sin.stride() != cos.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        q_out = torch.empty((batch, seq_len, num_heads, head_dim), dtype=q.dtype, device=q.device)
        k_out = v_out = None
        if k is not None:
            k_out = torch.empty((batch, seq_len, num_kv_heads, head_dim), dtype=q.dtype, device=q.device)
            v_out = torch.empty_like(k_out)
        if n_rows:
            config = launch("qk_norm_rope", str(head_dim), q.device)
            q_rows = _token_rows(q)
            k_rows = q_rows if k is None else _token_rows(k)
            v_rows = k_rows if v is None else _token_rows(v)
            heads = num_heads + num_kv_heads * (1 if v_from_k else 2)
            _qk_norm_rope_fwd_kernel[(cdiv(n_rows, config.blocks["BLOCK_M"]), heads)](
                q_ptr=q_rows,
                k_ptr=k_rows,
                v_ptr=v_rows,
                cos_ptr=cos,
                sin_ptr=sin,
                q_weight_ptr=q_weight,
                k_weight_ptr=q_weight if k_weight is None else k_weight,
                q_out_ptr=q_out,
                k_out_ptr=q_out if k_out is None else k_out,
                v_out_ptr=q_out if v_out is None else v_out,
                q_row_stride=q_rows.stride(0),
                k_row_stride=k_rows.stride(0),
                v_row_stride=v_rows.stride(0),
                cos_batch_stride=cos.stride(0) if cos.shape[0] > 1 else 0,
                cos_row_stride=cos.stride(1),
                n_rows=n_rows,
                seq_len=seq_len,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                eps=eps,
                ROTARY_HALF=rotary_dim // 2,
                V_FROM_K=v_from_k,
                HALF=head_dim // 2,
                BLOCK_D=next_power_of_2(head_dim // 2),
                **config.kwargs(),
            )
        # Frozen weights are persistent module state, not activations: no hook needs to see them.
        ctx.trains = any(ctx.needs_input_grad[5:7])
        ctx.frozen = () if ctx.trains else (q_weight, k_weight)
        ctx.save_for_backward(q, k, v, cos, sin, *((q_weight, k_weight) if ctx.trains else ()))
        ctx.shape = (head_dim, rotary_dim, v_from_k, eps)
        ctx.set_materialize_grads(False)
        return q_out, k_out, v_out

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_out, dk_out, dv_out):
        q, k, v, cos, sin, q_weight, k_weight = ctx.saved_tensors + ctx.frozen
        head_dim, rotary_dim, v_from_k, eps = ctx.shape
        batch, seq_len = q.shape[:2]
        n_rows = batch * seq_len
        num_heads = q.shape[-1] // head_dim
        num_kv_heads = 0 if k is None else k.shape[-1] // head_dim
        needs_dweight = ctx.trains
        own_values = k is not None and not v_from_k

        def gradient(grad: torch.Tensor | None, heads: int) -> torch.Tensor:
            # An output nobody used has no gradient: rare enough to feed the same launch zeros.
            if grad is None:
                return torch.zeros((batch, seq_len, heads, head_dim), dtype=q.dtype, device=q.device)
            return _unit_stride(grad)

        dq_out = gradient(dq_out, num_heads)
        dk_out = dq_out if k is None else gradient(dk_out, num_kv_heads)
        dv_out = dq_out if k is None else gradient(dv_out, num_kv_heads)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk = None if k is None else torch.empty(k.shape, dtype=k.dtype, device=k.device)
        dv = torch.empty(v.shape, dtype=v.dtype, device=v.device) if own_values else None
        dq_weight = dk_weight = None
        if n_rows == 0 and needs_dweight:
            dq_weight = torch.zeros_like(q_weight)
            dk_weight = None if k_weight is None else torch.zeros_like(k_weight)
        if n_rows:
            config = launch("qk_norm_rope", str(head_dim), q.device)
            q_rows = _token_rows(q)
            k_rows = q_rows if k is None else _token_rows(k)
            v_rows = k_rows if v is None else _token_rows(v)
            blocks = cdiv(n_rows, config.blocks["BLOCK_M"])
            heads = num_heads + num_kv_heads * (2 if dv is not None else 1)
            partial = None
            if needs_dweight:
                partial = torch.zeros(
                    (blocks, num_heads + num_kv_heads, head_dim), dtype=torch.float32, device=q.device
                )
            dq_strides, dk_strides, dv_strides = dq_out.stride(), dk_out.stride(), dv_out.stride()
            _qk_norm_rope_bwd_kernel[(blocks, heads)](
                dq_out_ptr=dq_out,
                dk_out_ptr=dk_out,
                dv_out_ptr=dv_out,
                q_ptr=q_rows,
                k_ptr=k_rows,
                v_ptr=v_rows,
                cos_ptr=cos,
                sin_ptr=sin,
                q_weight_ptr=q_weight,
                k_weight_ptr=q_weight if k_weight is None else k_weight,
                dq_ptr=dq,
                dk_ptr=dq if dk is None else dk,
                dv_ptr=dq if dv is None else dv,
                dweight_ptr=cos if partial is None else partial,
                dq_out_batch_stride=dq_strides[0],
                dq_out_row_stride=dq_strides[1],
                dq_out_head_stride=dq_strides[2],
                dk_out_batch_stride=dk_strides[0],
                dk_out_row_stride=dk_strides[1],
                dk_out_head_stride=dk_strides[2],
                dv_out_batch_stride=dv_strides[0],
                dv_out_row_stride=dv_strides[1],
                dv_out_head_stride=dv_strides[2],
                q_row_stride=q_rows.stride(0),
                k_row_stride=k_rows.stride(0),
                v_row_stride=v_rows.stride(0),
                cos_batch_stride=cos.stride(0) if cos.shape[0] > 1 else 0,
                cos_row_stride=cos.stride(1),
                n_rows=n_rows,
                seq_len=seq_len,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                eps=eps,
                ROTARY_HALF=rotary_dim // 2,
                V_FROM_K=v_from_k,
                NEEDS_DWEIGHT=needs_dweight,
                HALF=head_dim // 2,
                BLOCK_D=next_power_of_2(head_dim // 2),
                **config.kwargs(),
            )
            if partial is not None:
                sums = partial.sum(dim=0)
                dq_weight = sums[:num_heads].sum(dim=0).to(q_weight.dtype)
                dk_weight = sums[num_heads:].sum(dim=0).to(k_weight.dtype) if k_weight is not None else None
        return dq, dk, dv, None, None, dq_weight, dk_weight, None, None, None, None


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor | None,
    head_dim: int,
    rotary_dim: int | None = None,
    values_from_keys: bool = False,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Norms and rotates the projections of one attention layer.

    Args:
        q: [batch, seq_len, num_heads * head_dim], the raw query projection; float32, bfloat16 or float16.
        k: [batch, seq_len, num_kv_heads * head_dim], or None on layers that reuse another layer's keys and values.
        v: like `k`; None where `k` is None or `values_from_keys` is set.
        cos, sin: [batch or 1, seq_len, head_dim], any floating dtype, constants.
        q_weight, k_weight: [head_dim], the norms' weights; `k_weight` None where `k` is None.
        head_dim: even.
        rotary_dim: how many of the dimensions turn (the first half of them in each half of the head); None: all.
        values_from_keys: take the values from the raw key projection (Gemma 4's K=V layers).
        eps: added to the mean squares.

    Returns:
        q, k, v as [batch, seq_len, heads, head_dim], contiguous; k and v are None where `k` is None.

    Raises:
        TypeError: unsupported or unequal dtypes. ValueError: shapes that do not fit, or different devices.
    """
    check_dtype("q", q)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if head_dim % 2 or rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(f"fastgemma: head_dim {head_dim} and rotary_dim {rotary_dim} must be even and in order.")
    if (k is None) != (k_weight is None) or (v is None) != (k is None or values_from_keys):
        raise ValueError("fastgemma: qk_norm_rope takes q alone, q and k with values_from_keys, or q, k and v.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is None:
            continue
        if x.dtype != q.dtype:
            raise TypeError(f"fastgemma: {name} is {x.dtype}, q {q.dtype}; cast one.")
        if x.dim() != 3 or x.shape[:2] != q.shape[:2] or x.shape[2] % head_dim:
            raise ValueError(
                f"fastgemma: {name} has shape {tuple(x.shape)}, not [batch, seq_len, heads * {head_dim}] beside q "
                f"{tuple(q.shape)}."
            )
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle.dim() != 3 or angle.shape[0] not in (1, q.shape[0]) or angle.shape[1:] != (q.shape[1], head_dim):
            raise ValueError(
                f"fastgemma: {name} has shape {tuple(angle.shape)}, not [{q.shape[0]} or 1, {q.shape[1]}, {head_dim}]."
            )
    if q_weight.shape != (head_dim,) or (k_weight is not None and k_weight.shape != (head_dim,)):
        raise ValueError(f"fastgemma: norm weights must have shape [{head_dim}].")
    if not runs_kernel(q, k, v, cos, sin, q_weight, k_weight):
        return qk_norm_rope_reference(
            q, k, v, cos, sin, q_weight, k_weight, head_dim, rotary_dim, values_from_keys, eps
        )
    return _QKNormRope.apply(q, k, v, cos, sin, q_weight, k_weight, head_dim, rotary_dim, values_from_keys, eps)


def qk_norm_rope_reference(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor | None,
    head_dim: int,
    rotary_dim: int | None = None,
    values_from_keys: bool = False,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`qk_norm_rope` in plain torch; float64 inputs stay float64, everything else is computed in float32."""
    high = torch.promote_types(q.dtype, torch.float32)
    half, turning = head_dim // 2, (head_dim if rotary_dim is None else rotary_dim) // 2
    turns = (torch.arange(head_dim, device=q.device) % half) < turning
    cos = torch.where(turns, cos.to(high), 1.0).unsqueeze(2)
    sin = torch.where(turns, sin.to(high), 0.0).unsqueeze(2)

    def norm(x: torch.Tensor) -> torch.Tensor:
        x = x.to(high).unflatten(-1, (-1, head_dim))
        return x * torch.pow(x.square().mean(-1, keepdim=True) + eps, -0.5)

    def rotate(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        n = norm(x) * weight.to(high)
        return (n * cos + torch.cat((-n[..., half:], n[..., :half]), dim=-1) * sin).to(q.dtype)

    if k is None or k_weight is None:
        return rotate(q, q_weight), None, None
    values = k if values_from_keys or v is None else v
    return rotate(q, q_weight), rotate(k, k_weight), norm(values).to(q.dtype)
