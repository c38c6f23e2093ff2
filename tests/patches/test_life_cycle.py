"""What users do with a model while it is patched, or after: each time what stock would have made of it."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import structures
import torch
from kernel_checks import FLOAT32_BUDGET, relative_error
from patch_state import counts
from quick import slow_after
from torch import nn
from transformers import Gemma4ForCausalLM

import fastgemma
from fastgemma.kernels.backend import Kernel
from fastgemma.patches.snapshot import Snapshots

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The last layer reads the keys and values of the first.
SHAPE: dict[str, Any] = {
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 1,
}
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]

Results = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    fastgemma.unpatch()
    yield
    fastgemma.unpatch()


def build(name: str = "e2b", **overrides: Any) -> Any:
    return structures.build(name, **{**SHAPE, **overrides}).to(DEVICE)


def lora(base: nn.Module, **options: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **options)
    return peft.get_peft_model(base, config)


def batch(seed: int = 3) -> dict[str, Any]:
    return structures.batch("padding", seq_len=9, seed=seed, device=DEVICE)


def step(model: nn.Module, seed: int = 3) -> Results:
    """Loss and gradients."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model.train()(**batch(seed)).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def update(model: nn.Module, seed: int) -> torch.Tensor:
    """Gradient descent, and the loss before it."""
    loss = step(model, seed)["loss"]
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
    return loss


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**{**batch(), "labels": None}).logits


def assert_equal(actual: Results, expected: Results, budget: float = FLOAT32_BUDGET) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = relative_error(actual[name], value)
        assert error <= budget, f"{name}: relative error {error:.2e}"


# Files


def test_a_pickled_model_needs_nothing_of_fastgemma() -> None:
    class Stock(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            assert not module.startswith("fastgemma"), f"{module}.{name}"
            return super().find_class(module, name)

    model = lora(build())
    with fastgemma.patched():
        expected = step(model)
        layer = model.get_base_model().model.layers[0]
        layer._fastgemma_snapshots = Snapshots()  # what a replayed layer notes
        file = io.BytesIO(pickle.dumps(model))
    assert_equal(step(Stock(file).load()), expected)


SCRIPT = """
import sys
sys.modules["fastgemma"] = None  # whoever imports it fails
import peft, torch
from transformers import Gemma4ForCausalLM
base = Gemma4ForCausalLM.from_pretrained("base", dtype=torch.float32)
model = peft.PeftModel.from_pretrained(base, "adapter").eval()
with torch.no_grad():
    torch.save(model(**torch.load("batch.pt")).logits, "logits.pt")
"""


@pytest.mark.slow
def test_an_adapter_loads_in_a_process_without_fastgemma(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "base")
    with fastgemma.patched(per_layer_embeddings="host"):
        model = lora(Gemma4ForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).to(DEVICE))
        before = logits(model)
        for seed in (1, 2):
            update(model, seed)
        expected = logits(model)
        model.save_pretrained(tmp_path / "adapter")
    inputs = structures.batch("padding", seq_len=9)
    inputs.pop("labels")
    torch.save(inputs, tmp_path / "batch.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = torch.load(tmp_path / "logits.pt").to(DEVICE)
    assert relative_error(loaded, expected) <= FLOAT32_BUDGET < relative_error(before, expected)


# A model's life under PEFT


def live(quantized: bool, trained: Results | None) -> tuple[Results, Results]:
    """Everything that a run sees, and the adapters' weights after training; `trained` replaces them."""

    def logits(model: Any) -> torch.Tensor:
        """On some CPUs bitsandbytes repacks 4-bit weights in evaluation, and multiplies in bfloat16 from then on."""
        with torch.no_grad():
            return model.train(quantized)(**{**batch(), "labels": None}).logits

    model = build()
    if quantized:
        structures.quantize(model)
        model.is_loaded_in_4bit = True  # PEFT merges such a model in its own way
    model = lora(model)
    seen = {"first": update(model, 1)}
    second = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    torch.manual_seed(2)
    model.add_adapter("second", second)
    seen["second added"] = update(model, 2)
    model.set_adapter("second")
    seen["second alone"] = update(model, 3)
    model.set_adapter("default")
    seen |= step(model, 4)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}
    if trained is not None:  # merging into 4 bits rounds: equal to the last bit only from equal weights
        model.load_state_dict(trained, strict=False)
    seen["evaluated"] = logits(model)
    if not quantized:
        prompt = batch()["input_ids"][:1, :5]
        seen["generated"] = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
    model.merge_adapter(["second"])
    seen["merged"] = logits(model)
    model.unmerge_adapter()
    seen["unmerged"] = step(model, 5)["loss"]
    seen["unloaded"] = logits(copy.deepcopy(model).unload())
    model.delete_adapter("second")
    seen["deleted"] = step(model, 6)["loss"]
    merged = model.merge_and_unload()
    assert type(merged) is Gemma4ForCausalLM
    seen["merged for good"] = logits(merged)
    if not quantized:
        seen |= {f"then {name}": tensor for name, tensor in step(merged.requires_grad_(True), 7).items()}
    return seen, weights


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit", "ignore:Adapter .* was active")
def test_adapters_come_and_go(quantized: bool) -> None:
    expected, weights = live(quantized, None)
    before = counts()["lora"][0]
    with fastgemma.patched():
        actual, trained = live(quantized, weights)
    assert counts()["lora"][0] > before
    assert_equal(trained, weights)
    assert_equal(actual, expected)


def test_trained_weights_go_back_into_a_stock_model() -> None:
    stock, ours = build(), build()
    update(stock, 1)
    with fastgemma.patched():
        update(ours, 1)
    state = ours.state_dict()
    assert_equal(state, stock.state_dict())
    fresh = build(seed=5)
    assert str(fresh.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert torch.equal(logits(fresh), logits(ours))


@pytest.mark.parametrize("size", slow_after(1, [structures.VOCAB + 9, structures.VOCAB - 7]))
def test_embeddings_resized_between_steps(size: int) -> None:
    def run() -> Results:
        model = build()
        update(model, 1)
        torch.manual_seed(0)
        model.resize_token_embeddings(size)
        inputs = batch()
        ids = inputs["input_ids"].clamp(max=size - 1)
        ids[0, 3] = size - 1
        model.zero_grad()
        loss = model.train()(**{**inputs, "input_ids": ids, "labels": ids}).loss
        loss.backward()
        return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}

    expected = run()
    with fastgemma.patched():
        assert_equal(run(), expected)


# Threads


def test_one_thread_trains_while_another_evaluates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models of equal shapes, whose masks are the same."""
    launches = threading.Lock()  # Triton's interpreter runs one kernel at a time
    get = Kernel.__getitem__

    def one_at_a_time(kernel: Kernel, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(**kwargs: Any) -> None:
            with launches:
                get(kernel, grid)(**kwargs)

        return launch

    monkeypatch.setattr(Kernel, "__getitem__", one_at_a_time)
    trained, evaluated = lora(build()), build("31b", num_kv_shared_layers=0)
    ids = torch.randint(3, structures.VOCAB, (2, 9), device=DEVICE)

    def evaluate() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [evaluated.eval()(input_ids=ids, use_cache=False).logits for _ in range(4)]

    def train() -> list[torch.Tensor]:
        return [trained.train()(input_ids=ids, labels=ids).loss.detach(), *(update(trained, n) for n in (1, 2))]

    start = copy.deepcopy(trained.state_dict())
    expected = train(), evaluate()
    trained.load_state_dict(start)
    found: list[Any] = [None, None]
    barrier = threading.Barrier(2)

    def work(number: int) -> None:
        barrier.wait(10)
        found[number] = (train, evaluate)[number]()

    with fastgemma.patched():
        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for actual, right in zip(found, expected):
        assert actual is not None
        assert_equal(dict(enumerate(actual)), dict(enumerate(right)))  # type: ignore[arg-type]
