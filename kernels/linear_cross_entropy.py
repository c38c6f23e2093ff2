"""Log-probabilities and cross-entropy of `hidden @ weight.T`, without keeping the logits.

Ignored rows are dropped first; the others pass in chunks through one reused buffer of logits (`chunked_head`, with the
count of GEMMs), where each row is reduced and turned into its gradient in place (`logits`, with the formulas, and
`softcapped_logits`). What is here says which gradients are computed ahead, checks arguments, and gives both operations
in plain torch.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); the final softcap of
`Gemma4ForCausalLM` in transformers; the per-token statistics of TRL's fused head.
"""

from __future__ import annotations

import torch

from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels.backend import as_rows, check_dtype, runs_kernel
from fastgemma.kernels.chunked_head import Head, Rows, head_bwd, head_fwd
from fastgemma.kernels.kept_rows import KeptRows
from fastgemma.kernels.logits import Readout, TokenStatistics
from fastgemma.kernels.workspace import workspace_bytes as default_workspace_bytes


def _scaled(values: torch.Tensor | None, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """values * scale, multiplied in float32 and rounded once. The scale has as many dimensions as the values: one of
    fewer would first be rounded to their dtype."""
    if values is None:
        return None
    return torch.mul(values, scale, out=torch.empty_like(values, dtype=dtype))


def _placed(rows: torch.Tensor | None, index: torch.Tensor | None, shape: torch.Size) -> torch.Tensor | None:
    """The gradient of hidden states of this shape: zeros with the given rows at `index`."""
    if rows is None:
        return None
    if index is None:
        return rows.view(shape)
    return rows.new_zeros(shape).view(-1, shape[-1]).index_copy_(0, index, rows).view(shape)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, index, head, outputs, grad_enabled):
        ctx.set_materialize_grads(False)
        needs = [needed and grad_enabled for needed in ctx.needs_input_grad[:3]]
        # With a frozen head, one upstream per row scales one row of the gradient, so that it can be computed ahead.
        ahead = needs[0] and not (needs[1] or needs[2])
        rows = Rows(as_rows(hidden), weight, bias, targets, index, head)
        stats, peak, log_sum, gradients = head_fwd(rows, outputs, [ahead, False, False])
        if ahead and "entropy" not in outputs:
            ctx.save_for_backward(gradients.hidden, index)
        elif any(needs):
            ctx.save_for_backward(gradients.hidden, index, hidden, weight, bias, targets, peak, log_sum, stats.entropy)
        ctx.head, ctx.shape = head, hidden.shape
        ctx.mark_non_differentiable(*(extra for extra in stats[2:] if extra is not None))
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy, *_):
        nothing = (None,) * 5
        if grad_log_probs is None and grad_entropy is None:
            return None, None, None, *nothing
        ahead, index, *saved = ctx.saved_tensors
        if ahead is not None and grad_entropy is None:
            d_hidden = _scaled(ahead, -grad_log_probs.unsqueeze(1), ahead.dtype)
            return _placed(d_hidden, index, ctx.shape), None, None, *nothing
        hidden, weight, bias, targets, peak, log_sum, entropy = saved
        rows = Rows(as_rows(hidden), weight, bias, targets, index, ctx.head)
        wanted = list(ctx.needs_input_grad[:3])
        gradients = head_bwd(rows, peak, log_sum, entropy, grad_log_probs, grad_entropy, wanted)
        d_weight = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        d_bias = None if gradients.bias is None else gradients.bias.to(bias.dtype)
        return _placed(gradients.hidden, index, ctx.shape), d_weight, d_bias, *nothing


class _LinearCrossEntropySum(torch.autograd.Function):
    """The sum of the losses. One upstream for all rows lets every gradient be computed ahead."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, index, head, grad_enabled):
        ctx.set_materialize_grads(False)
        wanted = [needed and grad_enabled for needed in ctx.needs_input_grad[:3]]
        rows = Rows(as_rows(hidden), weight, bias, targets, index, head)
        stats, _, _, gradients = head_fwd(rows, (), wanted)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias, index)
        ctx.shape, ctx.is_empty = hidden.shape, targets.shape[0] == 0
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return (-stats.log_probs).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if grad_loss is None:
            return (None,) * 7
        d_hidden, d_weight, d_bias, index = ctx.saved_tensors
        if ctx.is_empty:
            # A mean over no rows sends an infinite or NaN upstream; the gradient of no rows is still zero.
            grad_loss = torch.zeros_like(grad_loss)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = _scaled(d_hidden, grad_loss.view(1, 1), ctx.dtypes[0]) if needs_hidden else None
        d_weight = _scaled(d_weight, grad_loss.view(1, 1), ctx.dtypes[1]) if needs_weight else None
        d_bias = _scaled(d_bias, grad_loss.view(1), ctx.dtypes[2]) if needs_bias else None
        return _placed(d_hidden, index, ctx.shape), d_weight, d_bias, None, None, None, None


def _check(
    op: str,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    temperature: float,
    workspace_bytes: int | None,
) -> None:
    check_dtype("hidden_states", hidden_states)
    check_dtype("weight", weight)
    if bias is not None:
        check_dtype("bias", bias)
    if targets.dtype != torch.int64:
        raise TypeError(f"fastgemma: {op} got targets of {targets.dtype}; give int64.")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"fastgemma: {op} needs a weight of [vocabulary, hidden], got {tuple(weight.shape)}.")
    if hidden_states.dim() == 0 or hidden_states.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"fastgemma: {op} got hidden states of shape {tuple(hidden_states.shape)} for a weight of shape "
            f"{tuple(weight.shape)}; their last dimensions must agree."
        )
    if targets.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"fastgemma: {op} got targets of shape {tuple(targets.shape)} for hidden states of shape "
            f"{tuple(hidden_states.shape)}; give one target per row."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"fastgemma: {op} got a bias of shape {tuple(bias.shape)} for {weight.shape[0]} tokens.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"fastgemma: {op} got softcap={softcap}; give a positive number, or None for no softcap.")
    if not temperature > 0:
        raise ValueError(f"fastgemma: {op} got temperature={temperature}; give a positive number.")
    if workspace_bytes is not None and workspace_bytes <= 0:
        raise ValueError(f"fastgemma: {op} got workspace_bytes={workspace_bytes}; give a positive number of bytes.")


def _check_range(targets: torch.Tensor, n_cols: int) -> None:
    """On the CPU, where looking costs nothing; a GPU would have to be waited for, and its kernel answers NaN."""
    if targets.device.type == "cpu" and bool(((targets < 0) | (targets >= n_cols)).any()):
        raise IndexError(
            f"fastgemma: a target lies outside the vocabulary of {n_cols} tokens, from {targets.min()} to "
            f"{targets.max()}."
        )


def _head(
    hidden: torch.Tensor, softcap: float | None, logit_scale: float, temperature: float, workspace_bytes: int | None
) -> Head:
    device = hidden.device
    autocast = torch.is_autocast_enabled(device.type)
    return Head(
        Readout(None if softcap is None else float(softcap), float(logit_scale), float(temperature)),
        torch.get_autocast_dtype(device.type) if autocast else hidden.dtype,
        default_workspace_bytes(device) if workspace_bytes is None else workspace_bytes,
    )


def linear_log_probs(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("log_probs",),
    workspace_bytes: int | None = None,
) -> TokenStatistics:
    """Per-token statistics of `softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature`.

    With z those logits and p = softmax(z): `log_probs` is log p[target], `entropy` -sum(p log p), `log_sum_sq_probs`
    log sum(p^2), `mean_logits` mean(z), `is_top1` whether the target is the first argmax of z. Gradients flow to
    `hidden_states`, `weight` and `bias`, through `log_probs` and `entropy` only.

    GEMMs run in the dtype of `hidden_states`, or in autocast's where it is enabled; a weight of another dtype is cast
    slab by slab, never as a whole. (float32 hidden states and a bfloat16 weight make a float32 head.)

    Args:
        hidden_states: [N, hidden_size], float32, bfloat16 or float16, any strides.
        weight: [vocabulary, hidden_size], one of those dtypes.
        targets: [N] int64, from 0 to vocabulary - 1. On the GPU a row whose target lies outside gets NaN, in its
            results and its gradient: finding it earlier would mean waiting for the GPU.
        bias: [vocabulary] or None.
        softcap: positive, or None for none.
        logit_scale: factor before the softcap.
        temperature: positive divisor after the softcap.
        outputs: names of the wanted fields of the result.
        workspace_bytes: bytes of the reused logits buffer; a float32 head takes a quarter more. At least 16 rows are
            processed at a time whatever it says. Default: `workspace.workspace_bytes()`.

    Returns:
        TokenStatistics of [N] float32 (`is_top1`: bool); what is not in `outputs` is None.

    Raises:
        TypeError: unsupported dtypes. ValueError: shapes that do not fit, tensors on different devices, unknown
            outputs, a softcap or temperature that is not positive. IndexError: a target outside the vocabulary (CPU).
    """
    unknown = [name for name in outputs if name not in TokenStatistics._fields]
    if unknown:
        raise ValueError(f"fastgemma: linear_log_probs knows {', '.join(TokenStatistics._fields)}; got {unknown}.")
    _check("linear_log_probs", hidden_states, weight, targets, bias, softcap, temperature, workspace_bytes)
    if hidden_states.dim() != 2:
        raise ValueError(f"fastgemma: linear_log_probs takes [N, hidden], got {tuple(hidden_states.shape)}.")
    on_kernel = runs_kernel(hidden_states, weight, targets, bias)
    _check_range(targets, weight.shape[0])
    if not on_kernel:
        return linear_log_probs_reference(
            hidden_states, weight, targets, bias, softcap, logit_scale, temperature, outputs
        )
    head = _head(hidden_states, softcap, logit_scale, temperature, workspace_bytes)
    stats = TokenStatistics(
        *_LinearLogProbs.apply(
            hidden_states,
            weight,
            _contiguous(bias),
            targets.contiguous(),
            None,
            head,
            tuple(outputs),
            torch.is_grad_enabled(),
        )
    )
    return stats if "log_probs" in outputs else stats._replace(log_probs=None)


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | torch.Tensor | None = None,
    kept_rows: KeptRows | None = None,
    workspace_bytes: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of the logits that `linear_log_probs` describes, over the rows whose label is not ignored.

    Ignored rows cost nothing, and their gradient is exactly zero. If every row is ignored, the mean is NaN and the sum
    is zero, as in torch, and every gradient is zero. No float32 copy of the head is made, but a trainable head's
    gradient is kept in float32 from the forward to the backward (reductions other than "none").

    Args:
        hidden_states: [..., hidden_size], as in `linear_log_probs`.
        weight: [vocabulary, hidden_size].
        labels: [...] int64, aligned with the hidden states (see `shift_labels`). On the GPU a label outside the
            vocabulary that is not `ignore_index` makes the loss NaN.
        bias, softcap, logit_scale, temperature, workspace_bytes: as in `linear_log_probs`.
        ignore_index: the label of rows without a loss.
        reduction: "mean" over the rows that are not ignored, "sum", or "none".
        num_items_in_batch: an int or a tensor of one element; the loss is then the sum divided by it.
        kept_rows: the rows to keep, from these labels and this `ignore_index`, if they were already worked out (before
            the backbone ran, so that nothing waits here).

    Returns:
        A float32 scalar; for reduction "none" float32 of the shape of `labels`, zero where ignored.

    Raises:
        TypeError, IndexError: as in `linear_log_probs`. ValueError: likewise; an unknown reduction, "none" with
            `num_items_in_batch`, or `kept_rows` of other labels.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"fastgemma: linear_cross_entropy got reduction={reduction!r}; give mean, sum or none.")
    if reduction == "none" and num_items_in_batch is not None:
        raise ValueError("fastgemma: num_items_in_batch divides a sum; it needs reduction mean or sum.")
    _check("linear_cross_entropy", hidden_states, weight, labels, bias, softcap, temperature, workspace_bytes)
    if kept_rows is not None and (kept_rows.total != labels.numel() or kept_rows.ignore_index != ignore_index):
        raise ValueError(
            f"fastgemma: kept_rows was made from {kept_rows.total} labels with ignore_index={kept_rows.ignore_index}; "
            f"this call has {labels.numel()} with ignore_index={ignore_index}."
        )
    if isinstance(num_items_in_batch, torch.Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                f"fastgemma: num_items_in_batch is one number, got a tensor of {tuple(num_items_in_batch.shape)}."
            )
        num_items_in_batch = num_items_in_batch.reshape(()).to(hidden_states.device, non_blocking=True)
    if not runs_kernel(hidden_states, weight, labels, bias):
        return linear_cross_entropy_reference(
            hidden_states,
            weight,
            labels,
            bias,
            softcap,
            logit_scale,
            temperature,
            ignore_index,
            reduction,
            num_items_in_batch,
        )
    kept_rows = KeptRows(labels, ignore_index) if kept_rows is None else kept_rows
    count = kept_rows.count
    index = None if count == labels.numel() else kept_rows.index()
    targets = labels.reshape(-1)
    targets = targets.contiguous() if index is None else targets.index_select(0, index)
    _check_range(targets, weight.shape[0])
    head = _head(hidden_states, softcap, logit_scale, temperature, workspace_bytes)
    arguments = (hidden_states, weight, _contiguous(bias), targets, index, head)
    if reduction == "none":
        losses = -_LinearLogProbs.apply(*arguments, (), torch.is_grad_enabled())[0]
        if index is not None:
            losses = losses.new_zeros(labels.numel()).index_copy(0, index, losses)
        return losses.view(labels.shape)
    total = _LinearCrossEntropySum.apply(*arguments, torch.is_grad_enabled())
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    return total / count if reduction == "mean" else total


def _contiguous(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.contiguous()


def shift_labels(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Labels moved one place to the left, the last one ignored: row t then holds what position t predicts.

    Moving the labels spares slicing, and so copying, the hidden states.

    Args:
        labels: [..., sequence], any integer dtype.
        ignore_index: what the last place is filled with.

    Returns:
        A new tensor of the same shape and dtype.
    """
    return torch.nn.functional.pad(labels[..., 1:], (0, min(labels.shape[-1], 1)), value=ignore_index)


def _full_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> torch.Tensor:
    high = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(high) @ weight.to(high).t()
    if bias is not None:
        z = z + bias.to(high)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def linear_log_probs_reference(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("log_probs",),
) -> TokenStatistics:
    """`linear_log_probs` in plain torch with full logits; float64 stays float64, the rest is computed in float32."""
    z = _full_logits(hidden_states, weight, bias, softcap, logit_scale, temperature)
    log_p = torch.log_softmax(z, dim=-1)
    results = {}
    if "log_probs" in outputs:
        results["log_probs"] = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    if "entropy" in outputs:
        # The bound makes p log p zero, and differentiable, where p is zero.
        results["entropy"] = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
    if "log_sum_sq_probs" in outputs:
        results["log_sum_sq_probs"] = torch.logsumexp(2 * log_p.detach(), dim=-1)
    if "mean_logits" in outputs:
        results["mean_logits"] = z.detach().mean(-1)
    if "is_top1" in outputs:
        results["is_top1"] = z.detach().argmax(-1) == targets
    return TokenStatistics(**results)


def linear_cross_entropy_reference(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear_cross_entropy` in plain torch with full logits."""
    z = _full_logits(hidden_states, weight, bias, softcap, logit_scale, temperature).flatten(0, -2)
    summed = reduction if num_items_in_batch is None else "sum"
    loss = torch.nn.functional.cross_entropy(z, labels.reshape(-1), ignore_index=ignore_index, reduction=summed)
    if num_items_in_batch is not None:
        loss = loss / num_items_in_batch
    return loss.view(labels.shape) if reduction == "none" else loss
