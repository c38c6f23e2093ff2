"""Generation with a cache and left padding: stock's tokens in float32, logits as exact as stock's in bfloat16."""

from __future__ import annotations

import statistics

import pytest
import structures
import torch
from kernel_checks import FLOAT32_BUDGET, STOCK_L2_FACTOR, gpu, relative_error
from quick import slow_after
from transformers import GenerationConfig

import fastgemma


def left_padded(device: torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, structures.VOCAB, (2, 11), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


@pytest.mark.parametrize("cache_implementation", (None, pytest.param("static", marks=pytest.mark.slow)))
@pytest.mark.parametrize("name", slow_after(1, ("e2b", "12b", "26b-a4b")))
def test_same_tokens_as_stock(name, cache_implementation, device):
    if name == "26b-a4b" and cache_implementation == "static":
        pytest.skip("a static cache compiles the decoding step, which expert routing does not allow on the CPU")
    model = structures.build(name).to(device).eval()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    if cache_implementation is not None:
        options |= {"cache_implementation": cache_implementation, "disable_compile": True}
    stock = model.generate(**left_padded(device), **options)
    before = fastgemma.status()["rope"].fast_calls
    with fastgemma.patched():
        patched = model.generate(**left_padded(device), **options)
    assert fastgemma.status()["rope"].fast_calls > before
    assert torch.equal(patched, stock)


@pytest.mark.slow
def test_continuous_batching(device):
    """Its cache reaches the attention by another way; it takes heads of one size."""
    heads = {"head_dim": 32, "global_head_dim": 32, "num_global_key_value_heads": 4, "attention_k_eq_v": False}
    model = structures.build("31b", attn_implementation="sdpa", **heads).to(device).eval()
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def generated():
        results = model.generate_batch([[5, 6, 7, 8, 9, 10], [7, 8, 9]], settings, progress_bar=False)
        assert len(results) == 2 and not any(result.error for result in results.values())
        return sorted(result.generated_tokens for result in results.values())

    stock = generated()
    before = fastgemma.status()["rope"].fast_calls
    with fastgemma.patched():
        assert generated() == stock
    assert fastgemma.status()["rope"].fast_calls > before


@pytest.mark.slow
@pytest.mark.parametrize("name", structures.STRUCTURES)
def test_cached_logits_equal_full_ones(name, device):
    """Decoding one token at a time gives the logits of one forward over the whole row."""
    model = structures.build(name).to(device).eval()
    ids = left_padded(device)["input_ids"][1:]
    with fastgemma.patched(), torch.no_grad():
        full = model(input_ids=ids, use_cache=False).logits
        cache, steps = None, []
        for position in range(ids.shape[1]):
            out = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-4)


def logits_along(model: torch.nn.Module, prompt: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """[rows, steps, vocabulary]: the logits that precede each of `tokens`, which are fed one by one to a cache."""
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    cache, steps = None, []
    with torch.no_grad():
        for step in range(tokens.shape[1]):
            positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[:, -1])
            ids = tokens[:, step : step + 1]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return torch.stack(steps, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, seeds",
    [pytest.param(torch.float32, 1, id="float32"), pytest.param(torch.bfloat16, 5, id="bfloat16", marks=gpu)],
)
@pytest.mark.parametrize("name", ("e2b", "12b", "31b"))
def test_decoding_is_as_exact_as_stock(name, dtype, seeds, device):
    """Along stock's greedy tokens, so that two near-equal logits cannot send the two models different ways."""
    stock_errors, errors = [], []
    for seed in range(seeds):
        model = structures.build(name, seed=seed).to(device, dtype).eval()
        prompt = left_padded(device, seed)
        generated = model.generate(**prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
        tokens = generated[:, prompt["input_ids"].shape[1] :]
        stock = logits_along(model, prompt, tokens)
        before = fastgemma.status()["rope"].fast_calls
        with fastgemma.patched():
            patched = logits_along(model, prompt, tokens)
        assert fastgemma.status()["rope"].fast_calls > before
        assert patched.dtype == stock.dtype == dtype
        if dtype == torch.float32:
            assert torch.equal(stock.argmax(dim=-1), tokens), "not the inputs that generate() gave the model"
        truth = logits_along(model.float(), prompt, tokens)  # in float32 that is stock again
        stock_errors.append(relative_error(stock, truth))
        errors.append(relative_error(patched, truth))
    assert statistics.mean(errors) <= max(FLOAT32_BUDGET, STOCK_L2_FACTOR * statistics.mean(stock_errors))


@pytest.mark.slow
def test_training_after_generation(device):
    model = structures.build("e2b").to(device).train()
    batch = structures.batch("padding", device=device)
    expected = model(**batch).loss
    with fastgemma.patched():
        model.eval().generate(**left_padded(device), max_new_tokens=3, do_sample=False)
        loss = model.train()(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
