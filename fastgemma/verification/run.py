"""`verify`: runs the model stock, in float32, with each feature alone and with all of them, and compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastgemma import api
from fastgemma.kernels.backend import HAS_TRITON, interpreting
from fastgemma.patches.engine import PatchError
from fastgemma.verification import judge, measure, truth
from fastgemma.verification.judge import Yardstick
from fastgemma.verification.measure import LOSS, Result, VerifyError
from fastgemma.verification.preserve import attention_implementation, preserved, without_dropout
from fastgemma.verification.report import FeatureVerdict, VerifyReport

Settings = dict[str, Any]  # feature -> mode

_NOT_EXERCISED = {
    "checkpointing": "acts when checkpointing is switched on",
    "cuda_graphs": "acts after several steps of a shape, and replays the same kernels",
    "optimizer": "acts after the gradients",
}
_STOCK: Settings = dict.fromkeys(api.FEATURES, False)


def verify(model: Any, batch: Mapping[str, Any]) -> VerifyReport:
    """Compares stock and patched loss, logits and gradients of one training step of `model`, feature by feature.

    Runs forwards and backwards only: parameters do not change, and gradients, training modes, random states, the patch
    state and `status()`'s counters are afterwards what they were, also after an error or Ctrl-C. What `cuda_graphs` has
    recorded is dropped, and recorded anew. The features are those that are switched on; the defaults if none is.

    Everything runs in training mode, without a key/value cache unless the batch asks for one, and with dropout off:
    float32 would draw other masks. With dropout, all features together are compared with stock once more. The loss is
    that of `model(**batch)`: a loss that a trainer computes by itself is not run.

    In float32 the reference is stock; in 16 bits it is the same model in float32, where memory allows. What may differ
    by how much, and why, is in `fastgemma.verification.judge`, and is part of the report.

    Args:
        model: a Gemma 4 model as it goes into training: on its device, adapters attached. Called inside an autocast
            region, it is verified under autocast.
        batch: what a collator gives: `input_ids` and `labels` [rows, seq_len], `attention_mask`, `position_ids` and so
            on. Tensors are moved to the model's device. Nothing of the verdict depends on its size, and memory does.

    Returns:
        The report: `.ok`, `.features`, `.worst`, errors by tensor name; prints as a table.

    Raises:
        VerifyError: nothing could be verified; the message says why, and what to do.
    """
    verifier = _prepare(model, batch)
    try:
        with preserved(model, api.engine_ops()):
            model.train()
            return verifier.report()
    except torch.OutOfMemoryError as error:
        raise VerifyError(
            "fastgemma: the GPU's memory ran out in a training step of the model, stock or patched, so nothing was "
            "verified. Pass a shorter batch or fewer rows (stock needs memory for all logits), or switch on gradient "
            "checkpointing."
        ) from error


def _prepare(model: Any, batch: Mapping[str, Any]) -> _Verifier:
    """Checks what can be checked before anything runs. Raises VerifyError."""
    from fastgemma.patches.families import is_gemma4

    if not any(is_gemma4(module) for module in model.modules()):
        raise VerifyError(
            f"fastgemma: {type(model).__name__} is not a Gemma 4 model, and fastgemma changes no other. Pass a model "
            "of the families gemma4 or gemma4_unified, with or without adapters."
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise VerifyError(
            "fastgemma: no parameter of the model requires a gradient, so there is none to verify. Attach the adapter "
            "first, as for training: peft.get_peft_model(model, LoraConfig(...))."
        )
    if any(parameter._post_accumulate_grad_hooks for parameter in trained):
        raise VerifyError(
            "fastgemma: hooks run when gradients are accumulated (an optimizer inside the backward, or FSDP); a "
            "backward would change the model. Verify the model before the trainer is constructed."
        )
    if "_original_forward" in model.__dict__:
        raise VerifyError(
            "fastgemma: accelerate prepared this model for mixed precision, inside its forward, where a float32 "
            "reference cannot be had. Verify it before trainer.train(), or pass accelerator.unwrap_model(model, "
            "keep_fp32_wrapper=False)."
        )
    device = model.get_input_embeddings().weight.device  # of a model on several devices: where its inputs go
    dtype = _compute_dtype(model, device)
    if not HAS_TRITON:
        raise VerifyError("fastgemma: Triton is not installed (it is published for Linux only); stock code runs here.")
    if device.type == "cpu" and not interpreting():
        raise VerifyError(
            "fastgemma: the model is on the CPU, where kernels run only in Triton's interpreter, so there is nothing "
            "to compare. Move it to a GPU; or, for a small model in float32, start Python with TRITON_INTERPRET=1."
        )
    if device.type == "cpu" and dtype == torch.bfloat16:
        raise VerifyError(
            "fastgemma: Triton's interpreter does not compute in bfloat16, so on the CPU the result would mean "
            "nothing. Load the model in float32 (--dtype float32), or verify it on a GPU."
        )
    tensors = {key: each.to(device) if isinstance(each, torch.Tensor) else each for key, each in batch.items()}
    tensors.setdefault("use_cache", False)
    sample = measure.sample_logits(tensors, model.config.get_text_config().vocab_size)
    settings = api.settings()
    if not any(settings.values()):
        settings = {name: default for name, (default, _) in api.FEATURES.items()}
    settings["cuda_graphs"] = False
    # The other modes move the table of a model that was loaded before: for good, and without changing a number.
    if settings["per_layer_embeddings"]:
        settings["per_layer_embeddings"] = "gpu"
    return _Verifier(model, tensors, sample, device, dtype, settings)


def _compute_dtype(model: torch.nn.Module, device: torch.device) -> torch.dtype:
    """The coarsest dtype that the model computes in. Raises VerifyError."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and not hasattr(p, "quant_state")}
    dtypes |= {d for m in model.modules() if isinstance(d := getattr(m, "compute_dtype", None), torch.dtype)}
    for dtype in (torch.bfloat16, torch.float16):
        if dtype in dtypes:
            return dtype
    if dtypes != {torch.float32}:
        raise VerifyError(
            f"fastgemma: the model's weights are {', '.join(sorted(map(str, dtypes)))}; kernels take float32, bfloat16 "
            "and float16. Load it with one of these as dtype."
        )
    return torch.float32


@dataclass
class _Verifier:
    model: Any
    batch: dict[str, Any]
    sample: measure.LogitSample
    device: torch.device
    dtype: torch.dtype
    settings: Settings  # of all features together

    def report(self) -> VerifyReport:
        notes = [
            f"Logits: {len(self.sample.positions)} positions of each row; padding is left out.",
            f"The model computes in {str(self.dtype).removeprefix('torch.')}, in training mode.",
        ]
        if self.dtype != torch.float32 and getattr(self.model.config.get_text_config(), "enable_moe_block", False):
            notes.append(
                "Experts: in 16 bits a rounding may send a token to another expert, in stock code too, and that "
                "outweighs all rounding. Try another batch, or float32, before believing a verdict of wrong."
            )
        fixes = {**_STOCK, "fixes": True}
        with without_dropout(self.model) as has_dropout:
            stock = self._run(_STOCK)
            yardstick, from_truth = self._yardstick(stock, _STOCK, notes)
            features = {name: self._feature(name, yardstick) for name in api.FEATURES}
            base = _STOCK
            if features["fixes"].verdict == "changes numbers":
                base = fixes
                notes.append("`fixes` act on this batch: all features together are compared with stock and fixes.")
                fixed = self._run(fixes)
                yardstick, from_truth = self._yardstick(fixed, fixes, [])
            together, result = self._judged(self.settings, yardstick, list(api.FEATURES))
        if not together.fast_calls and together.verdict in ("exact", "inconclusive"):
            raise VerifyError(
                "fastgemma: none of its code ran in a training step of this model, so there is nothing to compare. "
                f"Why: {'; '.join(together.fallbacks) or 'every feature is off'}."
            )
        dropout = None
        if has_dropout:
            notes.append("Dropout was off, but in the line that says otherwise: there the masks are stock's.")
            if self.dtype == torch.float32:
                yardstick, _ = self._yardstick(self._run(base), base, [])
            else:
                yardstick = yardstick.beside(self._run(base), from_truth)
            dropout, _ = self._judged(self.settings, yardstick, list(api.FEATURES))
        return VerifyReport(
            features,
            together,
            dropout,
            stock[LOSS].item(),
            result[LOSS].item() if result else float("nan"),
            judge.RULES["float32" if self.dtype == torch.float32 else "truth" if from_truth else "stock"],
            tuple(notes),
        )

    def _run(self, settings: Settings) -> Result:
        with api.patched(**settings):
            return measure.run(self.model, self.batch, self.sample)

    def _yardstick(self, stock: Result, settings: Settings, notes: list[str]) -> tuple[Yardstick, bool]:
        """What results are measured by, and whether its reference is a float32 model's. `stock` ran with `settings`."""
        broken = [name for name, tensor in stock.items() if not tensor.isfinite().all()]
        if broken:
            raise VerifyError(
                f"fastgemma: stock's own {broken[0]} is not finite on this batch ({len(broken)} such tensors), so "
                "there is nothing to compare with. Training on it would fail with stock code too: check the batch, and "
                "use bfloat16 instead of float16."
            )
        other = self._other_attention(settings)
        if self.dtype == torch.float32:
            return judge.in_float32(stock, other, self.device), False
        eps = torch.finfo(self.dtype).eps
        problem = truth.truth_problem(self.model, self.device, self._activation_bytes())
        if problem is None:
            try:
                with truth.in_float32(self.model):
                    exact = self._run(settings)
                return judge.against_truth(exact, stock, other, self.device, eps), True
            except torch.OutOfMemoryError:
                self._drop_gradients()
                problem = "the GPU's memory ran out"
        notes.append(
            f"No float32 reference: {problem}. The patched model was compared with stock in its own dtype instead, "
            "which finds gross errors only. For a real verdict pass a shorter batch, or free memory."
        )
        if other is None:
            raise VerifyError(
                "fastgemma: neither the model in float32 nor stock's second attention implementation fits into memory "
                f"({problem}), so there is nothing to judge by. Pass a shorter batch or fewer rows."
            )
        return judge.against_stock(stock, other, self.device, eps), False

    def _other_attention(self, settings: Settings) -> Result | None:
        """Stock's result with another attention implementation of transformers', unless memory runs out."""
        current = self.model.config.get_text_config()._attn_implementation
        try:
            with attention_implementation(self.model, "sdpa" if current == "eager" else "eager"):
                return self._run(settings)
        except torch.OutOfMemoryError:
            self._drop_gradients()
            return None

    def _drop_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def _activation_bytes(self) -> int:
        """A coarse upper estimate of what a step in float32 keeps: logits and their softmax, and every layer's.

        On a GPU nothing: there one can try, and running out does no harm.
        """
        if self.device.type == "cuda":
            return 0
        config = self.model.config.get_text_config()
        layer = 14 * config.hidden_size + 6 * config.intermediate_size
        tokens = self.batch["labels"].numel()
        return 4 * tokens * (5 * config.vocab_size + config.num_hidden_layers * layer)

    def _feature(self, name: str, yardstick: Yardstick) -> FeatureVerdict:
        if name in _NOT_EXERCISED:
            return FeatureVerdict("not exercised", note=_NOT_EXERCISED[name])
        if not self.settings[name]:
            return FeatureVerdict("off")
        verdict, _ = self._judged({**_STOCK, name: self.settings[name]}, yardstick, [name])
        if verdict.verdict == "refused":
            return verdict
        if name == "fixes":
            if verdict.fast_calls:
                note = "on purpose: stock is wrong on this batch"
                return FeatureVerdict("changes numbers", verdict.fast_calls, note=note)
            return FeatureVerdict("did not act")
        if not verdict.fast_calls and verdict.verdict in ("exact", "inconclusive"):
            note = "" if verdict.fallbacks else "nothing in this step goes through it"
            return FeatureVerdict("did not run", fallbacks=verdict.fallbacks, note=note)
        return verdict

    def _judged(
        self, settings: Settings, yardstick: Yardstick, counted: list[str]
    ) -> tuple[FeatureVerdict, Result | None]:
        """Runs with `settings`, and judges the result; fast calls and fallbacks are those of the features `counted`."""
        before = api.status()
        try:
            result = self._run(settings)
        except PatchError as error:
            self._drop_gradients()
            return FeatureVerdict("refused", note=str(error)), None
        after = api.status()
        fallbacks: dict[str, int] = {}
        for name in counted:
            for reason, count in after[name].fallbacks.items():
                more = count - before[name].fallbacks.get(reason, 0)
                if more:
                    fallbacks[reason] = fallbacks.get(reason, 0) + more
        tensors = yardstick.judge(result)
        fine = "inconclusive" if yardstick.blunt else "exact"
        verdict = FeatureVerdict(
            fine if all(errors.ok for errors in tensors.values()) else "wrong",
            sum(after[name].fast_calls - before[name].fast_calls for name in counted),
            fallbacks,
            tensors=tensors,
        )
        return verdict, result
