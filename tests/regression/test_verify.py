"""`verify`: an exact model passes, a wrong kernel is blamed, and everything is afterwards as it was."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structures
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.gemma4 import modeling_gemma4
from typer.testing import CliRunner

import fastgemma
from fastgemma.__main__ import app
from fastgemma.patches import mlp, norms
from fastgemma.verification import judge, load, measure, truth

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CUDA = torch.cuda.is_available()


def adapted(model: torch.nn.Module, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=PROJECTIONS, lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def small(name: str = "31b", **overrides: Any) -> torch.nn.Module:
    """The fewest layers that have every part of the structure."""
    return structures.build(name, layer_types=["sliding_attention", "full_attention"], **overrides)


def batch(kind: str = "padding", device: torch.device | None = None) -> dict[str, Any]:
    return structures.batch(kind, seq_len=8, device=device or torch.device("cpu"))


def only(*features: str) -> None:
    """What is off is not run."""
    fastgemma.patch(**{name: name in features for name in fastgemma.api.FEATURES})


def one_percent_off(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Not by a common factor, which the norm that follows would take out again."""

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = function(*args, **kwargs)
        return torch.where(out > 0, 1.01 * out, out)

    return wrong


def state(model: torch.nn.Module) -> dict[str, Any]:
    """All that a user could find changed."""
    return {
        "settings": fastgemma.api.settings(),
        "patched": hasattr(modeling_gemma4.Gemma4RMSNorm.forward, "__wrapped__"),
        "counters": [(op.fast_calls, dict(op.fallbacks)) for op in fastgemma.api.engine_ops()],
        "parameters": [(name, id(p), p.dtype, p._version) for name, p in model.named_parameters()],
        "buffers": [(name, id(b), b.dtype) for name, b in model.named_buffers()],
        "grads": [(id(p.grad), None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "forwards": [module.__dict__.get("forward") for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "dropout": [getattr(module, "attention_dropout", None) for module in model.modules()],
        "attention": model.config.get_text_config()._attn_implementation,
        "use_cache": model.config.get_text_config().use_cache,
        "random": torch.get_rng_state().tolist(),
        "random of the GPU": torch.cuda.get_rng_state().tolist() if CUDA else None,
        "precision": torch.get_float32_matmul_precision(),
    }


@pytest.mark.slow
def test_an_exact_model_passes_and_is_left_as_it_was(device):
    model = adapted(small(), dropout=0.1).to(device).eval()
    model.get_submodule("base_model.model.model.layers.0").train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained[::2]:
        parameter.grad = torch.randn_like(parameter)
    torch.set_float32_matmul_precision("high")
    fastgemma.patch(geglu=False, attention=False, per_layer_embeddings="host")
    torch.manual_seed(11)
    before = state(model)
    try:
        report = fastgemma.verify(model, batch())
        assert state(model) == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert report.ok, report
    verdicts = {name: feature.verdict for name, feature in report.features.items()}
    assert verdicts["geglu"] == verdicts["attention"] == "off"  # the present settings, not the defaults
    for name in ("rms_norm", "rope", "lora", "cross_entropy"):
        assert verdicts[name] == "exact" and report.features[name].fast_calls
    assert verdicts["optimizer"] == verdicts["checkpointing"] == verdicts["cuda_graphs"] == "not exercised"
    assert verdicts["fixes"] == "did not act"
    assert report.with_dropout is not None and report.with_dropout.verdict == "exact"
    # Each feature's calls are its own run's: those of the norms alone do not count projections.
    assert report.together.fast_calls > report.features["lora"].fast_calls
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(report) == {"loss", "logits", "gradient", *names}
    assert report["loss"].error <= 1e-5 and report.loss == pytest.approx(report.stock_loss, rel=1e-5)
    assert "Verdict: exact" in str(report) and "1e-5" in str(report)


@pytest.mark.slow
def test_full_fine_tuning_with_per_layer_embeddings(device):
    model = small("e2b", num_kv_shared_layers=0).to(device)
    only("per_layer_embeddings", "rms_norm", "cross_entropy")
    report = fastgemma.verify(model, batch("packing"))
    assert report.ok, report
    assert report.features["per_layer_embeddings"].verdict == "exact"
    assert "model.embed_tokens_per_layer.weight" in report
    assert report.with_dropout is None


@pytest.mark.slow
@pytest.mark.parametrize("module, name, blamed", [(mlp, "geglu", {"geglu"}), (norms, "rms_norm", {"rms_norm"})])
def test_a_wrong_kernel_is_blamed(module, name, blamed, device, monkeypatch):
    only("geglu", "rms_norm", "cross_entropy")
    monkeypatch.setattr(module, name, one_percent_off(getattr(module, name)))
    model = adapted(small()).to(device)
    report = fastgemma.verify(model, batch())
    assert not report.ok
    assert {feature for feature, verdict in report.features.items() if not verdict.ok} == blamed
    assert f"{name}=False" in str(report)
    worst = report.features[name].worst
    assert worst is not None and not report.features[name].tensors[worst].ok


def test_a_wrong_gradient_alone_is_found(device, monkeypatch):
    """Loss and logits are stock's: only the gradients of one kind of tensor are off."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.view_as(weight)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.001

    only("rms_norm")
    original = norms.rms_norm
    monkeypatch.setattr(
        norms, "rms_norm", lambda x, weight, eps: original(x, weight if weight is None else Off.apply(weight), eps)
    )
    model = small().to(device)
    report = fastgemma.verify(model, batch())
    verdict = report.features["rms_norm"]
    assert verdict.verdict == "wrong" and verdict.worst is not None and verdict.worst.endswith("norm.weight")
    assert verdict.tensors["loss"].ok and verdict.tensors["logits"].ok


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("interruption", (Stop, KeyboardInterrupt))
@pytest.mark.parametrize("call", (1, 3, 6, 7))
def test_everything_is_restored_after_an_interruption(interruption, call, device, monkeypatch):
    """In the forward of call 1 (stock), 3 (stock, eager), 6 (the float32 model's logits), 7 (the first feature)."""
    model = adapted(small()).half().to(device)
    calls = iter(range(1, 100))
    original = type(model).forward

    def forward(self, *args, **kwargs):
        if next(calls) == call:
            raise interruption
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    fastgemma.patch(rope=False)
    before = state(model)
    with pytest.raises(interruption):
        fastgemma.verify(model, batch())
    assert state(model) == before


def test_what_float32_does_not_know_to_1e_5_is_judged_by_stock(device):
    def result(error: float) -> dict[str, torch.Tensor]:
        off = torch.tensor([1.0, error], device=device)
        return {"loss": torch.ones((), device=device), "logits": torch.ones(2, device=device), "weight": off}

    for other, ok in ((None, False), (0.0, False), (4e-6, False), (6e-6, True)):
        noise = None if other is None else result(other)
        errors = judge.in_float32(result(0.0), noise, device).judge(result(3e-5))
        assert errors["weight"].ok == ok and errors["loss"].limit == errors["logits"].limit == 1e-5
        assert judge.in_float32(result(0.0), noise, device).judge(result(9e-6))["weight"].ok


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_function_is_no_yardstick(dtype, device):
    """Padding on the left predicts the first token, under `eager` from the mean of all values."""
    only("geglu")
    model = adapted(small()).to(dtype).to(device)
    given = structures.batch("padding", seq_len=8)
    given["attention_mask"] = given["attention_mask"].flip(1)
    given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    report = fastgemma.verify(model, given)
    assert report.ok and report.features["geglu"].verdict == "exact", report
    assert report["gradient"].limit <= (1e-5 if dtype == torch.float32 else 5e-2), report


def test_fp16_is_judged_by_the_float32_model(device, monkeypatch):
    only("geglu")
    model = adapted(small()).half().to(device)
    report = fastgemma.verify(model, batch())
    assert report.ok, report
    assert report["logits"].stock_error and report["logits"].limit == 1.5 * report["logits"].stock_error
    assert "against the same model in float32" in report.rule
    monkeypatch.setattr(mlp, "geglu", one_percent_off(mlp.geglu))
    assert fastgemma.verify(model, batch()).features["geglu"].verdict == "wrong"


def test_no_verdict_where_stock_is_as_inexact_as_anything(device, monkeypatch):
    only("geglu")
    monkeypatch.setattr(judge, "_BLUNT", 1e-6)
    model = adapted(small()).half().to(device)
    report = fastgemma.verify(model, batch())
    assert report.features["geglu"].verdict == report.together.verdict == "inconclusive", report
    assert not report.ok and not report.conclusive and "Verdict: none." in str(report)
    monkeypatch.setattr(mlp, "geglu", lambda gate, up: torch.full_like(up, torch.nan))
    report = fastgemma.verify(model, batch())
    assert report.conclusive and not report.ok and "geglu=False" in str(report)


def test_without_memory_for_the_truth_stock_is_the_reference(device, monkeypatch):
    only("geglu")
    monkeypatch.setattr(truth, "_free_bytes", lambda device: 1000)
    model = adapted(small()).half().to(device)
    report = fastgemma.verify(model, batch())
    assert report.ok, report
    assert "against stock in the same dtype" in report.rule
    assert any("No float32 reference: it would need" in note for note in report.notes)
    monkeypatch.setattr(mlp, "geglu", lambda gate, up: -up)
    assert not fastgemma.verify(model, batch()).ok


def test_running_out_of_memory(device, monkeypatch):
    """In the float32 model: stock is the reference. In stock's own step: nothing can be verified."""

    def exhausted(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("simulated")

    only("geglu")
    model = adapted(small()).half().to(device)
    monkeypatch.setattr(truth, "in_float32", exhausted)
    report = fastgemma.verify(model, batch())
    assert report.ok and any("the GPU's memory ran out" in note for note in report.notes), report
    monkeypatch.setattr(type(model), "forward", exhausted)
    before = state(model)
    with pytest.raises(fastgemma.VerifyError, match="Pass a shorter batch or fewer rows"):
        fastgemma.verify(model, batch())
    assert state(model) == before


@pytest.mark.parametrize("name", ("e2b", "12b", "26b-a4b"))
def test_the_float32_model_is_the_model_in_float32(name, device):
    """Of a model without frozen weights it is `model.float()`; frozen weights, upcast in passing, give the same."""
    model = structures.build(name).bfloat16().to(device).train()
    inputs = batch(device=device)
    sample = measure.sample_logits(inputs, structures.VOCAB)
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    with truth.in_float32(model):
        found = measure.run(model, inputs, sample)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = measure.run(model.float(), inputs, sample)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert measure.distance(found[key], value, torch.device("cpu")).relative <= 1e-6, key


def test_the_float32_model_dequantises_as_bitsandbytes_does(device):
    model = small("e2b", num_kv_shared_layers=0)
    structures.quantize(model)
    model = adapted(model).to(device).train()
    inputs = batch(device=device)
    sample = measure.sample_logits(inputs, structures.VOCAB)
    expected = measure.run(model, inputs, sample)  # computes in float32 already
    with truth.in_float32(model):
        found = measure.run(model, inputs, sample)
    for key, value in expected.items():
        assert measure.distance(found[key], value, torch.device("cpu")).relative <= 1e-5, key
    only("lora")
    report = fastgemma.verify(model, batch())
    assert report.ok and report.features["lora"].verdict == "exact", report


def test_fixes_are_reported_apart(device):
    """Packed rows with a mask of ones: stock lets documents attend to each other, on which `fixes` acts."""
    only("rms_norm", "fixes")
    packed = structures.batch("packing")
    packed["attention_mask"] = torch.ones_like(packed["input_ids"])
    report = fastgemma.verify(adapted(small()).to(device), packed)
    assert report.features["fixes"].verdict == "changes numbers" and report.ok, report
    assert report.loss != pytest.approx(report.stock_loss, rel=1e-4)


def test_a_refusal_is_a_verdict(device, monkeypatch):
    def refuse(*args: Any) -> None:
        raise fastgemma.PatchError("not like this")

    only("rms_norm")
    monkeypatch.setattr(norms, "rms_norm", refuse)
    report = fastgemma.verify(small().to(device), batch())
    assert report.features["rms_norm"].verdict == "refused" and not report.ok
    assert report.features["rms_norm"].note == "not like this" and "not like this" in str(report)


def test_what_did_not_run_is_said(device):
    only("rms_norm", "geglu")
    model = adapted(small()).to(device)
    for layer in model.get_submodule("base_model.model.model.layers"):
        layer.mlp.act_fn = torch.nn.GELU()
    verdict = fastgemma.verify(model, batch()).features["geglu"]
    assert verdict.verdict == "did not run" and verdict.fallbacks == {"activation GELU": 4}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model, batch: batch.pop("labels"), "no `labels`"),
        (lambda model, batch: batch["labels"].fill_(-100), "every label of the batch is -100"),
        (lambda model, batch: model.requires_grad_(False), "no parameter of the model requires a gradient"),
        (lambda model, batch: model.double(), "kernels take float32, bfloat16"),
        (lambda model, batch: model.lm_head.weight.data.fill_(float("nan")), "is not finite on this batch"),
        (
            lambda model, batch: model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: None),
            "a backward would change the model",
        ),
        (lambda model, batch: setattr(model, "_original_forward", model.forward), "accelerate prepared this model"),
    ],
)
def test_what_cannot_be_verified_says_why(change, message, device):
    model, given = small().to(device), batch()
    change(model, given)
    with pytest.raises(fastgemma.VerifyError, match=message):
        fastgemma.verify(model, given)


def test_other_models_and_idle_features_are_refused(device):
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(fastgemma.VerifyError, match="Linear is not a Gemma 4 model"):
        fastgemma.verify(linear, batch())
    fastgemma.patch(**{**dict.fromkeys(fastgemma.api.FEATURES, False), "optimizer": True})
    with pytest.raises(fastgemma.VerifyError, match="none of its code ran"):
        fastgemma.verify(small().to(device), batch())


@pytest.mark.skipif(CUDA, reason="bfloat16 is computed on the GPU")
def test_bfloat16_on_the_cpu_is_refused():
    with pytest.raises(fastgemma.VerifyError, match="does not compute in bfloat16"):
        fastgemma.verify(small().bfloat16(), batch())


def test_distances():
    device = torch.device("cpu")
    found = measure.distance(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]), device)
    assert found == (0.5, 5.0, 0.5, 4.0) and found.relative == 0.1
    zero = torch.zeros(2)
    assert measure.distance(zero, zero, device).relative == 0.0
    assert measure.distance(torch.ones(2), zero, device).relative == float("inf")
    nan = measure.distance(torch.tensor([float("nan"), 1.0]), torch.ones(2), device)
    errors = judge.TensorErrors(nan.relative, 1.0, nan.largest, 1.0, None)
    assert not errors.ok
    long = torch.randn(measure._SLAB + 5)
    assert measure.distance(long * 1.01, long, device).relative == pytest.approx(0.01, rel=1e-4)


def test_sampled_logits_are_those_that_count():
    given = batch()
    given["labels"][:, :4] = -100
    sample = measure.sample_logits(given, structures.VOCAB)
    assert sample.positions.tolist() == [3, 4, 5, 6]
    assert sample.real.tolist() == [[True] * 4, [True, False, False, False]]
    few = measure.sample_logits(given, structures.VOCAB, max_bytes=2 * 4 * 2 * structures.VOCAB)
    assert few.positions.tolist() == [3, 6]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastgemma.demo.checkpoint import build_tokenizer

    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(structures.VOCAB)
    tokenizer.save_pretrained(path)
    small(
        "e2b", num_kv_shared_layers=0, vocab_size=len(tokenizer), vocab_size_per_layer_input=len(tokenizer)
    ).save_pretrained(path)
    return path


def invoke(*arguments: str) -> Any:
    device = [] if CUDA else ["--device", "cpu"]
    return CliRunner().invoke(app, ["verify", *arguments, *device, "--dtype", "float32", "--seq-len", "12"])


@pytest.mark.slow
def test_the_command_line_finds_an_exact_model(checkpoint):
    result = invoke(str(checkpoint), "--rank", "2", "--4bit")
    assert result.exit_code == 0 and "Verdict: exact" in result.output, result.output
    for name in ("rms_norm", "rope", "geglu", "lora", "cross_entropy", *([] if CUDA else ["attention"])):
        assert re.search(rf"{name} alone\s+│ exact ", result.output), name
    assert not any(fastgemma.api.settings().values())


@pytest.mark.slow
def test_the_command_line_finds_a_wrong_kernel(checkpoint, monkeypatch):
    monkeypatch.setattr(mlp, "geglu", one_percent_off(mlp.geglu))
    result = invoke(str(checkpoint), "--rank", "0", "--batch-size", "1")
    assert result.exit_code == 1 and "geglu=False" in result.output, result.output


def test_an_adapter_directory_is_loaded_with_its_base(checkpoint, tmp_path):
    from transformers import Gemma4ForCausalLM

    saved = adapted(Gemma4ForCausalLM.from_pretrained(checkpoint))
    saved.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("A text of its own.")
    request = load.Request(tmp_path, tmp_path / "text.txt", 40, 2, False, 16, "float32", "auto")
    model, given = load.load(request)
    expected = {name: parameter for name, parameter in saved.named_parameters() if "lora" in name}
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].cpu(), parameter) for name, parameter in expected.items())
    assert given["input_ids"].shape == (2, 40)  # repeated, being short


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nowhere",), "nowhere is not a directory"),
        ((".",), "could not be loaded"),
        ((".", "--4bit", "--rank", "0"), "weights in 4 bits cannot be trained"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2 and message in result.output, result.output


def test_an_unexpected_error_is_no_verdict(checkpoint, monkeypatch):
    def fail(request: load.Request) -> None:
        raise RuntimeError("out of the ordinary")

    monkeypatch.setattr(load, "load", fail)
    result = invoke(str(checkpoint))
    assert result.exit_code == 2 and "out of the ordinary" in result.output


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_without_a_gpu_or_the_interpreter_the_command_line_says_what_to_do(checkpoint, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    result = invoke(str(checkpoint))
    assert result.exit_code == 2 and "TRITON_INTERPRET=1" in result.output
    with pytest.raises(fastgemma.VerifyError, match="TRITON_INTERPRET=1"):
        fastgemma.verify(small(), batch())


@pytest.mark.slow
def test_importing_fastgemma_imports_no_transformers():
    code = "import fastgemma, sys; assert fastgemma.verify; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_new_adapters_get_a_second_factor(checkpoint):
    request = load.Request(checkpoint, None, 8, 1, False, 2, "float32", "auto")
    model, given = load.load(request)
    assert all(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)
    assert given["labels"].shape == (1, 8)
