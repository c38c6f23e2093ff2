"""bitsandbytes' optimizers cost the host a tenth of a millisecond for every parameter, hundreds of times a step.

After each they wait for the GPU. The kernels of a step run on the stream that the gradients were computed on, one after
another, so while the GPU is still in the backward the host can enqueue the whole step behind it. Two cases do need the
wait: paged states, which the host may move, and another stream than the default one, which bitsandbytes does not use.

Before each they go through a dispatcher, checks and conversions that take many times as long as the launch. Here the C
function that they end in gets the same arguments straight away, and whatever is unusual goes the long way. That
function takes no stream, so the launch is the same whichever stream is current: only the wait asks about it.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable
from ctypes import c_bool, c_float, c_int32, c_void_p
from typing import Any

import torch
from torch import nn

from fastgemma.patches.engine import Op, fingerprint

# What the C functions of bitsandbytes 0.50.0 to 0.50.2 take. C cannot tell that it was called with another version's
# arguments, so the functions on the way to it must have the one fingerprint that they have in these versions.
_KNOWN = frozenset({"3180c9c82b33"})
# p, g, state1, state2; beta1, beta2, beta3, alpha, eps; step, lr; qmap1, qmap2, absmax1, absmax2;
# weight_decay, gnorm_scale, skip_zeros, n
_8BIT_TYPES = (*[c_void_p] * 4, *[c_float] * 5, c_int32, c_float, *[c_void_p] * 4, c_float, c_float, c_bool, c_int32)
# g, p, state1, state2, unorm; max_unorm, param_norm; beta1, beta2, beta3, alpha, eps, weight_decay;
# step, lr, gnorm_scale, skip_zeros, n
_32BIT_TYPES = (*[c_void_p] * 5, *[c_float] * 8, c_int32, c_float, c_float, c_bool, c_int32)
_GRADIENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of bitsandbytes' tables
_PLAIN = (nn.Parameter, torch.Tensor)


def _known(update_step: Callable[..., Any]) -> bool:
    """Whether all that lies between `update_step` and C reads as it did when the types above were written down."""
    try:
        from bitsandbytes import functional
        from bitsandbytes.backends.cuda import ops

        between: tuple[Callable[..., Any], ...] = (
            update_step,
            functional.optimizer_update_8bit_blockwise,
            functional.optimizer_update_32bit,
            functional.get_ptr,
            ops._optimizer_update_8bit_blockwise_impl,
            ops._optimizer_update_32bit_impl,
        )
        return fingerprint("\n".join([inspect.getsource(function) for function in between])) in _KNOWN
    except (ImportError, AttributeError, OSError, TypeError):
        return False


def _c_function(
    update_step: Callable[..., Any], name: str, dtype: torch.dtype, state_dtype: torch.dtype
) -> Callable[..., None] | str:
    """The C function that `update_step` comes to, made to take plain numbers; or why it is not to be called."""
    if not _known(update_step):
        return "unknown bitsandbytes"
    from bitsandbytes.backends.cuda import ops

    by_state: dict[torch.dtype, tuple[tuple[Any, ...], dict[str, Any]]] = {
        torch.uint8: (_8BIT_TYPES, ops.str2optimizer8bit_blockwise),
        torch.float32: (_32BIT_TYPES, ops.str2optimizer32bit),
    }
    try:
        types, functions = by_state[state_dtype]
        return ctypes.cast(functions[name][_GRADIENT_DTYPES.index(dtype)], ctypes.CFUNCTYPE(None, *types))
    except (KeyError, ValueError, IndexError, ctypes.ArgumentError):
        return "no such kernel"  # bitsandbytes has none, or could not load its library


def _launch(
    optimizer: Any, group: dict[str, Any], p: Any, gindex: int, pindex: int, c_function: Callable[..., Any]
) -> str | None:
    """Launches the update of `p`; or says why bitsandbytes must, having changed nothing.

    No loops and no helpers: with them the checks would cost twice as much.
    """
    grad, state = p.grad, optimizer.state[p]
    state1, state2 = state["state1"], state["state2"]
    if optimizer.is_paged:
        return "paged states"
    if not p.is_cuda:
        return "no gpu"
    if type(p) not in _PLAIN or type(grad) is not torch.Tensor:
        return "tensor subclass"
    if not (p.is_contiguous() and grad.is_contiguous()):  # a sparse gradient is not
        return "not contiguous"
    dtype, state_dtype = grad.dtype, state1.dtype
    if p.dtype is not dtype:
        return "gradient of another dtype"
    index = torch._C._cuda_getDevice()
    if not (p.get_device() == grad.get_device() == state1.get_device() == state2.get_device() == index):
        return "not on the current device"
    function = c_function(optimizer.optimizer_name, dtype, state_dtype)
    if isinstance(function, str):
        return function
    config = optimizer.get_config(gindex, pindex, group)
    if config["max_unorm"] > 0.0:
        return "max_unorm"
    betas = config["betas"]
    beta3 = betas[2] if len(betas) >= 3 else 0.0
    try:
        if state_dtype is torch.uint8:
            qmap1, qmap2, absmax1, absmax2 = state["qmap1"], state["qmap2"], state["absmax1"], state["absmax2"]
            if not (qmap1.get_device() == qmap2.get_device() == absmax1.get_device() == absmax2.get_device() == index):
                return "not on the current device"
            function(
                p.data_ptr(), grad.data_ptr(), state1.data_ptr(), state2.data_ptr(),
                betas[0], betas[1], beta3, config.get("alpha", 0.0), config["eps"],
                state["step"] + 1, config["lr"],
                qmap1.data_ptr(), qmap2.data_ptr(), absmax1.data_ptr(), absmax2.data_ptr(),
                config["weight_decay"], 1.0, config["skip_zeros"], grad.numel(),
            )  # fmt: skip
        else:
            function(
                grad.data_ptr(), p.data_ptr(), state1.data_ptr(), state2.data_ptr(), None,
                config["max_unorm"], 0.0,
                betas[0], betas[1], beta3, config.get("alpha", 0.0), config["eps"], config["weight_decay"],
                state["step"] + 1, config["lr"], 1.0, config["skip_zeros"], grad.numel(),
            )  # fmt: skip
    except ctypes.ArgumentError:  # from a conversion: C was not entered
        return "a hyperparameter is not a number"
    state["step"] += 1
    return None


def make_update_step(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """`Optimizer2State.update_step`: the update of one parameter."""
    op = ops["optimizer"]
    c_function = functools.cache(functools.partial(_c_function, original))

    def update_step(self: Any, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        if not op.active or torch.compiler.is_compiling():
            return original(self, group, p, gindex, pindex)
        reason = _launch(self, group, p, gindex, pindex, c_function)
        if reason is not None:
            op.fallback(reason)
            return original(self, group, p, gindex, pindex)
        op.fast_calls += 1  # op.fast() would ask again whether this is being compiled
        return None

    return update_step


def make_sync(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """`sync_gpu` as `bitsandbytes.optim.optimizer` calls it."""
    from bitsandbytes.functional import GlobalPageManager

    op, pages = ops["optimizer"], GlobalPageManager.get_instance()

    def must_wait(t: torch.Tensor) -> str | None:
        if not t.is_cuda:
            return "no gpu"
        # The default stream's handle is 0; a Stream object would take longer to make than a launch.
        if torch._C._cuda_getCurrentRawStream(t.get_device()) != 0:
            return "a stream of its own"
        return "paged states" if pages.paged_tensors else None

    def sync_gpu(t: torch.Tensor) -> None:
        if not op.active:
            return original(t)
        reason = must_wait(t)
        if reason is not None:
            op.fallback(reason)
            return original(t)
        op.fast()
        return None

    return sync_gpu
