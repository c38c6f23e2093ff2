"""Linear layers as PEFT and bitsandbytes leave them: the same numbers as stock, and counters that say what ran."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import pytest
import structures
import torch
from kernel_checks import FLOAT32_BUDGET, relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from quick import slow_after, slow_rows_after
from torch import nn

import fastgemma

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TWO_LAYERS = ["sliding_attention", "full_attention"]  # q, k and v; then q and k alone, whose values are its keys
# The counted calls of a two-layer model: q, k and v at once, o, and the MLP as one operation.
CALLS = 6

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# The other kernels stay out of it: their rounding is not this file's subject, and the interpreter is slow.
ONLY: dict[str, Any] = {**dict.fromkeys(fastgemma.status(), False), "lora": True, "geglu": True}


@dataclass(frozen=True)
class Ran:
    """What a patched run did: projections that took the fast path, and those that did not, by reason."""

    fast: int
    fallbacks: dict[str, int]


def tiny(**overrides: Any) -> nn.Module:
    return structures.build("31b", **{"layer_types": TWO_LAYERS, **overrides}).to(DEVICE)


def gated() -> nn.Module:
    """A model with per-layer-embedding gates and shared keys and values."""
    return structures.build("e4b", layer_types=TWO_LAYERS * 2, num_kv_shared_layers=2).to(DEVICE)


def batch(**sizes: int) -> dict[str, Any]:
    return structures.batch("padding", **sizes, device=DEVICE)


def adapted(model: nn.Module, **options: Any) -> PeftModel:
    """The model with LoRA on its seven projections, away from its trivial start (B = 0)."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": [*ATTENTION, *MLP], "init_lora_weights": False, **options}
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**settings)).train()


def layers_of(model: nn.Module) -> nn.ModuleList:
    return (model.get_base_model() if isinstance(model, PeftModel) else model).model.layers


def modules_named(model: nn.Module, name: str) -> list[nn.Module]:
    return [module for path, module in model.named_modules() if path.endswith(name)]


def evaluate(model: nn.Module, inputs: dict[str, Any], context: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """Loss, logits and the gradient of everything that requires one."""
    model.zero_grad(set_to_none=True)
    leaves = {name: t for name, t in inputs.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(7)
    with context():
        outputs = model(**{**inputs, "use_cache": False})
    results = {"loss": outputs.loss.detach(), "logits": outputs.logits.detach()}
    if outputs.loss.requires_grad:
        outputs.loss.backward()
    for name, tensor in [*model.named_parameters(), *leaves.items()]:
        if tensor.grad is not None:
            results[f"d {name}"] = tensor.grad.clone()
    return results


def compare(
    model: nn.Module,
    inputs: dict[str, Any] | None = None,
    budget: float = FLOAT32_BUDGET,
    context: Callable[[], Any] = contextlib.nullcontext,
    features: dict[str, Any] = ONLY,
) -> Ran:
    """Runs the model stock and patched, holds every tensor to `budget`, and says what the patched runs did."""
    inputs = batch() if inputs is None else inputs
    stock = evaluate(model, inputs, context)
    runs = []
    # In parts, and as whole layers wherever a layer allows it: the same numbers, the same counts.
    for chosen in (features, {**features, "rms_norm": True, "rope": True}):
        before = fastgemma.status()["lora"]
        with fastgemma.patched(**chosen):
            ours = evaluate(model, inputs, context)
        after = fastgemma.status()["lora"]
        assert ours.keys() == stock.keys()
        for name, expected in stock.items():
            actual = ours[name]
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
            error = relative_error(actual, expected)
            assert error <= budget, f"{name}: relative error {error:.2e}"
        counts = {reason: n - before.fallbacks.get(reason, 0) for reason, n in after.fallbacks.items()}
        runs.append(Ran(after.fast_calls - before.fast_calls, {reason: n for reason, n in counts.items() if n}))
    assert runs[0].fallbacks == runs[1].fallbacks
    # A checkpointed layer is recomputed up to the last tensor that its backward needs, which is not the same in parts.
    assert runs[0].fast == runs[1].fast or model.is_gradient_checkpointing
    return runs[0]


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.grad is not None]


# One adapter


def test_bare_linear_layers() -> None:
    model = tiny().train()
    assert compare(model) == Ran(CALLS, {})
    assert len(trained(model)) == len(list(model.parameters()))


def test_one_adapter() -> None:
    model = adapted(tiny())
    assert compare(model) == Ran(CALLS, {})
    assert len(trained(model)) == 2 * (7 + 6)


@pytest.mark.parametrize(
    "targets", slow_after(1, [("q_proj", "v_proj"), ("k_proj",), ("down_proj",), ("gate_proj", "o_proj")])
)
def test_adapters_on_some_of_the_projections(targets: tuple[str, ...]) -> None:
    assert compare(adapted(tiny(), target_modules=list(targets))) == Ran(CALLS, {})


def test_without_the_geglu_kernel_the_mlp_is_two_calls() -> None:
    assert compare(adapted(tiny()), features={**ONLY, "geglu": False}) == Ran(CALLS + 2, {})


@pytest.mark.slow
def test_adapters_on_the_per_layer_embedding_gates() -> None:
    model = adapted(gated(), target_modules=[*ATTENTION, *MLP, "per_layer_input_gate", "per_layer_projection"])
    # Per layer: two of attention, the MLP, the gate and the projection behind it.
    assert compare(model) == Ran(4 * 5, {})
    assert any("per_layer_input_gate.lora_A" in name for name in trained(model))
    assert any("per_layer_projection.lora_B" in name for name in trained(model))


def test_base_weights_train_beside_the_adapter() -> None:
    model = adapted(tiny())
    for name in ("q_proj", "down_proj"):
        for layer in modules_named(model, f"{name}.base_layer"):
            layer.weight.requires_grad_()
    assert compare(model) == Ran(CALLS, {})
    assert any("q_proj.base_layer" in name for name in trained(model))


@pytest.mark.parametrize("frozen", slow_after(1, [("lora_A", "lora_B"), ("lora_A",), ("lora_B",)]))
def test_adapter_that_is_not_trained(frozen: tuple[str, ...]) -> None:
    model = adapted(tiny())
    for name, parameter in model.named_parameters():
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)
    inputs = batch()
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach().requires_grad_()
    assert compare(model, inputs) == Ran(CALLS, {})
    assert inputs["inputs_embeds"].grad is not None
    assert not [name for name in trained(model) if any(part in name for part in frozen)]


@pytest.mark.slow
def test_rank_stabilised_scaling() -> None:
    plain, stabilised = adapted(tiny()), adapted(tiny(), use_rslora=True)
    assert compare(stabilised) == Ran(CALLS, {})
    inputs = batch()
    with fastgemma.patched(**ONLY):
        assert plain(**inputs).loss != stabilised(**inputs).loss


def test_scale_set_between_steps() -> None:
    model = adapted(tiny())
    inputs = batch()
    assert compare(model) == Ran(CALLS, {})
    with fastgemma.patched(**ONLY):
        before = model(**inputs).loss
    for layer in modules_named(model, "_proj"):
        layer.set_scale("default", 3.0)
    assert compare(model) == Ran(CALLS, {})
    with fastgemma.patched(**ONLY):
        assert model(**inputs).loss != before


# Adapter states


@pytest.mark.parametrize("dropout", slow_after(1, [0.0, 0.5]))
def test_disabled_adapters_run_the_base_alone(dropout: float) -> None:
    """The reference pass of preference training: same model, adapters off, no gradient, no mask drawn."""
    model = adapted(tiny(), lora_dropout=dropout)
    inputs = batch()
    base = evaluate(tiny(), inputs, torch.no_grad)["logits"]
    with model.disable_adapter():
        assert compare(model, context=torch.no_grad) == Ran(CALLS, {})
        with fastgemma.patched(**ONLY), torch.no_grad():
            assert relative_error(model(**inputs).logits, base) <= FLOAT32_BUDGET
    assert compare(model).fast == CALLS


@pytest.mark.slow
def test_merged_adapter() -> None:
    model = adapted(tiny())
    model.merge_adapter()
    assert compare(model, context=torch.no_grad) == Ran(CALLS, {})
    model.unmerge_adapter()
    assert compare(model) == Ran(CALLS, {})


def test_disabling_a_merged_adapter_unmerges_it_as_stock_does() -> None:
    model = adapted(tiny())
    inputs = batch()
    with torch.no_grad(), model.disable_adapter():
        expected = model(**inputs).logits
    model.merge_adapter()
    with torch.no_grad(), model.disable_adapter(), fastgemma.patched(**ONLY):
        assert relative_error(model(**inputs).logits, expected) <= FLOAT32_BUDGET
    assert not any(layer.merged for layer in modules_named(model, "_proj"))


def test_several_active_adapters() -> None:
    model = adapted(tiny())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    # Per layer q (in the joint call) and the MLP have two; o_proj has one.
    assert compare(model) == Ran(2, {"several active adapters": 4})
    assert any("second" in name for name in trained(model))


def test_another_adapter_made_active() -> None:
    model = adapted(tiny())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.set_adapter("second")
    assert compare(model) == Ran(CALLS, {})
    assert trained(model) and all("second" in name for name in trained(model))


def test_dora() -> None:
    ran = compare(adapted(tiny(), use_dora=True))
    assert ran == Ran(0, {"LoRA variant DoraLinearVariant": CALLS})


@pytest.mark.slow
def test_dora_on_one_projection_only() -> None:
    assert compare(adapted(tiny(), use_dora=True, target_modules=["o_proj"])) == Ran(
        CALLS - 2, {"LoRA variant DoraLinearVariant": 2}
    )


def test_lora_bias() -> None:
    ran = compare(adapted(tiny(), lora_bias=True))
    assert ran == Ran(0, {"LoRA factors that are not plain linear layers": CALLS})


@pytest.mark.slow
def test_mixed_batch_of_adapters() -> None:
    model = adapted(tiny()).eval()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    inputs = {**batch(), "adapter_names": ["__base__", "second"]}
    assert compare(model, inputs, context=torch.no_grad) == Ran(0, {"hooks on a linear layer": CALLS})
    # The hooks that carry the names are gone afterwards.
    assert compare(model) == Ran(CALLS, {})


@pytest.mark.slow
def test_module_saved_with_the_adapter() -> None:
    model = adapted(tiny(), target_modules=list(ATTENTION), modules_to_save=["down_proj"])
    assert compare(model) == Ran(CALLS - 2, {"linear layer of type ModulesToSaveWrapper": 2})
    assert sum("modules_to_save" in name for name in trained(model)) == 2


@pytest.mark.slow
def test_linear_layers_with_a_bias() -> None:
    ran = compare(adapted(tiny(attention_bias=True)))
    assert ran == Ran(2, {"linear layer with a bias": 4})


# Hooks


def _register(module: nn.Module, kind: str, fired: list[str]) -> Any:
    def hook(*args: Any) -> None:
        fired.append(kind)

    return getattr(module, f"register_{kind}_hook")(hook)


@pytest.mark.parametrize("kind", slow_after(1, ["full_backward", "forward", "forward_pre", "full_backward_pre"]))
@pytest.mark.parametrize(
    ("place", "reason"),
    slow_rows_after(
        1,
        [
            ("q_proj", "hooks on a linear layer"),
            ("up_proj.base_layer", "hooks on a linear layer"),
            ("q_proj.lora_A.default", "hooks on a LoRA layer"),
            ("down_proj.lora_B.default", "hooks on a LoRA layer"),
        ],
    ),
)
def test_hooks_fire(kind: str, place: str, reason: str) -> None:
    model = adapted(tiny())
    fired: list[str] = []
    handle = _register(modules_named(layers_of(model)[0], place)[0], kind, fired)
    assert compare(model) == Ran(CALLS - 1, {reason: 1})
    assert fired == [kind] * 3, "once in the stock run and once in each patched one"
    handle.remove()
    assert compare(model) == Ran(CALLS, {})


def test_forward_set_on_an_instance_is_called() -> None:
    model = adapted(tiny())
    layer = layers_of(model)[0].self_attn.o_proj
    calls: list[int] = []
    stock = layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return stock(x)

    layer.forward = forward
    assert compare(model) == Ran(CALLS - 1, {"hooks on a linear layer": 1})
    assert len(calls) == 3


# Dropout


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_draws_the_masks_of_stock(checkpointing: bool) -> None:
    model = adapted(tiny(), lora_dropout=0.05)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ran = compare(model)
    assert ran.fallbacks == {}
    assert ran.fast > CALLS if checkpointing else ran.fast == CALLS
    inputs = batch()
    torch.manual_seed(8)
    with fastgemma.patched(**ONLY):
        other = model(**inputs).loss
    assert other != evaluate(model, inputs, contextlib.nullcontext)["loss"], "another seed drew the same masks"


def test_dropout_is_off_in_evaluation() -> None:
    assert compare(adapted(tiny(), lora_dropout=0.5).eval()) == Ran(CALLS, {})


@pytest.mark.slow
def test_dropout_on_the_per_layer_embedding_gates() -> None:
    targets = [*ATTENTION, *MLP, "per_layer_input_gate", "per_layer_projection"]
    assert compare(adapted(gated(), target_modules=targets, lora_dropout=0.05)).fallbacks == {}


# Dtypes


def no_worse_than_stock(
    make: Callable[[torch.dtype], nn.Module], dtype: torch.dtype, context: Callable[[], Any] = contextlib.nullcontext
) -> Ran:
    """Stock and patched runs in half precision against the same weights in float64; both return the same dtypes.

    Judged over all gradients together: a single one of a model this small says more about luck than about the code.
    """
    inputs = batch()
    model = make(dtype)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    truth_model = make(torch.float32).double()
    truth_model.load_state_dict(state)
    truth = evaluate(truth_model, inputs, contextlib.nullcontext)
    stock = evaluate(model, inputs, context)
    before = fastgemma.status()["lora"]
    with fastgemma.patched(**ONLY):
        ours = evaluate(model, inputs, context)
    after = fastgemma.status()["lora"]
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in stock.items()}
    for group in ("logits", "d "):
        names = [name for name in truth if name.startswith(group)]
        errors = [
            sum(relative_error(results[name], truth[name]) ** 2 for name in names) ** 0.5 for results in (ours, stock)
        ]
        # The interpreter truncates where a GPU rounds to bfloat16, in the GeGLU: it is granted that.
        allowed = errors[1] * (1.1 if dtype == torch.float16 else 1.6)
        assert errors[0] <= allowed, f"{group}: {errors[0]:.3e}, stock {errors[1]:.3e}"
    counts = {reason: n - before.fallbacks.get(reason, 0) for reason, n in after.fallbacks.items()}
    return Ran(after.fast_calls - before.fast_calls, {reason: n for reason, n in counts.items() if n})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast_adapter", [True, False])
def test_half_precision_model(dtype: torch.dtype, cast_adapter: bool) -> None:
    """PEFT keeps the adapters of a half-precision model in float32 unless told not to."""

    def make(dtype: torch.dtype) -> nn.Module:
        model = tiny().to(dtype)
        config = LoraConfig(r=4, target_modules=[*ATTENTION, *MLP], init_lora_weights=False)
        torch.manual_seed(1)
        return get_peft_model(model, config, autocast_adapter_dtype=cast_adapter).train()

    assert next(p for n, p in make(dtype).named_parameters() if "lora_A" in n).dtype == (
        torch.float32 if cast_adapter else dtype
    )
    assert no_worse_than_stock(make, dtype) == Ran(CALLS, {})


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_autocast_over_a_float32_model(dropout: float) -> None:
    """The Trainer's bf16=True."""

    def autocast() -> Any:
        return torch.autocast(DEVICE.type, torch.bfloat16)

    if dropout:
        model, inputs = adapted(tiny(), lora_dropout=dropout), batch()
        stock = evaluate(model, inputs, autocast)
        with fastgemma.patched(**ONLY):
            ours = evaluate(model, inputs, autocast)
        # Another mask would move the loss by far more than bfloat16 does.
        assert abs(ours["loss"] - stock["loss"]) < 2e-3 * stock["loss"]
        assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in stock.items()}
        return
    ran = no_worse_than_stock(lambda _: adapted(tiny()), torch.bfloat16, autocast)
    assert ran == Ran(CALLS, {})


# 4-bit bases


def quantised(
    model: nn.Module, nested: bool, quant_type: str = "nf4", compute: torch.dtype | None = torch.float32
) -> nn.Module:
    """The model with the linear layers of its decoder in 4 bits, as the loader makes them."""
    for path, module in list(model.model.named_modules()):
        if type(module) is not nn.Linear or "layers." not in path:
            continue
        layer = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=compute,
            compress_statistics=nested,
            quant_type=quant_type,
        )
        layer.weight = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, compress_statistics=nested, quant_type=quant_type
        )
        parent, _, name = path.rpartition(".")
        setattr(model.model.get_submodule(parent), name, layer.to(DEVICE))  # the move is what quantises
    model.is_loaded_in_4bit = True
    return model


@pytest.mark.parametrize("nested", slow_after(1, [True, False]))
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_nf4_base_with_an_adapter(nested: bool, dropout: float) -> None:
    model = adapted(quantised(tiny(), nested), lora_dropout=dropout)
    assert type(layers_of(model)[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(layers_of(model)[0].mlp.up_proj).__module__.startswith("peft.")
    assert compare(model) == Ran(CALLS, {})
    assert len(trained(model)) == 2 * (7 + 6)


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_base_alone(nested: bool) -> None:
    model = quantised(tiny(), nested).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inputs = batch()
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach().requires_grad_()
    assert compare(model, inputs) == Ran(CALLS, {})


def test_nf4_base_whose_layers_were_never_called() -> None:
    """bitsandbytes settles a layer's compute dtype at its first call, which may be ours."""
    model = adapted(quantised(tiny(), nested=False, compute=None))
    with fastgemma.patched(**ONLY):
        loss = model(**batch()).loss
    layer = layers_of(model)[0].mlp.up_proj.base_layer
    assert layer.compute_type_is_set and layer.compute_dtype == torch.float32
    assert relative_error(loss, model(**batch()).loss) <= FLOAT32_BUDGET


def test_decoding_takes_the_fused_4_bit_product() -> None:
    model = adapted(quantised(tiny(), nested=False))
    ran = compare(model, context=torch.no_grad)
    assert ran == Ran(0, {"few rows: fused 4-bit product": CALLS})


def test_nf4_base_with_the_adapter_disabled() -> None:
    model = adapted(quantised(tiny(), nested=False))
    with model.disable_adapter(), fastgemma.patched(**ONLY), torch.no_grad():
        ours = model(**batch(rows=6)).loss
    with model.disable_adapter(), torch.no_grad():
        stock = model(**batch(rows=6)).loss
    assert relative_error(ours, stock) <= FLOAT32_BUDGET


def test_other_4_bit_types() -> None:
    model = adapted(quantised(tiny(), nested=False, quant_type="fp4"))
    assert compare(model) == Ran(0, {"4-bit type fp4": CALLS})
