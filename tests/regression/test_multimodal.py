"""Images, video and sound: loss, logits and every gradient of the multimodal models, patched against stock."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import structures
import torch
from kernel_checks import STOCK_L2_FACTOR, assert_float32, attends_in_float32, gpu, relative_error
from peft import LoraConfig, get_peft_model
from quick import slow_after
from transformers import Gemma4ForConditionalGeneration
from transformers.models.gemma4.modeling_gemma4 import Gemma4Model, Gemma4RMSNorm
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedModel, Gemma4UnifiedRMSNorm

import fastgemma

Results = dict[str, torch.Tensor]

PROJECTIONS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
TOWERS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio")
ALWAYS = ("rms_norm", "rope", "geglu", "lora", "cross_entropy")
FEATURES = (*ALWAYS, "attention", "per_layer_embeddings")

# What is particular to each: images are causal, and layers share keys and values; experts; keys that are the values;
# no towers, and images that see themselves in every layer and beyond the window.
ONE_OF_EACH = ["sliding_attention", "full_attention"]
LARGE = {"layer_types": ONE_OF_EACH, "use_bidirectional_attention": "vision"}
FEW_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1}
TEXT: dict[str, dict[str, Any]] = {
    "e2b": {"layer_types": ONE_OF_EACH * 2},
    "26b-a4b": {**structures.STRUCTURES["26b-a4b"], **LARGE},
    "31b": {**structures.STRUCTURES["31b"], **LARGE, **FEW_HEADS},
    "12b": LARGE,
}
VISION = ("26b-a4b", "31b", "12b")  # whose images see themselves in both directions
# Images longer than the window of 8, at either end of a row, side by side, and rows without any.
BATCHES = {
    "images": ["3 i4 5 i10 2", "i3 4 i2", "8"],
    "video": ["1 v2 2 v2 3", "9", "2 i3 v4 1"],
    "sound": ["2 a5 4", "a3 1 a2 2", "6"],
    "all": ["3 i4 2 v2 1 v2 2 a3 2", "7"],
    "text": ["9", "5"],
}
# Older transformers take videos in another form, or (5.20) do not hand on what they then ask for: they run without.
VIDEOS = "num_frames_per_video=num" in inspect.getsource(Gemma4ForConditionalGeneration.forward)
with_videos = pytest.mark.skipif(not VIDEOS, reason="transformers with another form of videos, or none")


def build(name: str, seed: int = 0) -> Any:
    model = (structures.unified_multimodal if name == "12b" else structures.multimodal)(**TEXT[name])
    return structures.randomize(model, seed).train()


def adapt(model: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, init_lora_weights=False)
    return get_peft_model(model, config, autocast_adapter_dtype=False).train()


def batch_for(model: Any, kind: str, side: str = "right", **options: Any) -> dict[str, Any]:
    device = next(model.parameters()).device
    return structures.multimodal_batch(model.config, BATCHES[kind], side, device=device, **options)


def without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Those of the tokens: what padding predicts differs between attention implementations."""
    with torch.no_grad():
        out = model(**without_labels(batch)).logits
    return out[batch["attention_mask"] == 1] if batch.get("attention_mask") is not None else out


def step(model: Any, batch: dict[str, Any]) -> Results:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "logits": logits(model, batch), **grads}


def counts() -> dict[str, tuple[int, dict[str, int]]]:
    status = fastgemma.status()
    return {feature: (status[feature].fast_calls, dict(status[feature].fallbacks)) for feature in FEATURES}


def gained(before: dict[str, tuple[int, dict[str, int]]]) -> Iterator[tuple[str, int, dict[str, int]]]:
    for feature, (fast, reasons) in counts().items():
        fast_before, reasons_before = before[feature]
        new = {reason: n - reasons_before.get(reason, 0) for reason, n in reasons.items()}
        yield feature, fast - fast_before, {reason: n for reason, n in new.items() if n}


def compare(model: Any, batch: dict[str, Any]) -> Results:
    """Stock's results, after those of the patched model were found equal, and none of it had fallen back."""
    stock = step(model, batch)
    before = counts()
    with fastgemma.patched():
        ours = step(model, batch)
    for feature, fast, fallbacks in gained(before):
        if feature == "attention" and batch["input_ids"].is_cuda:
            assert fallbacks == {"torch.float32": 2}
            continue
        assert not fallbacks, feature
        assert fast or feature not in (*ALWAYS, "attention"), f"{feature} never ran"
    assert_float32(ours, stock)
    return stock


CASES = [
    pytest.param(
        name,
        kind,
        side,
        marks=[with_videos] * (kind in ("video", "all")) + [pytest.mark.slow] * ((name, kind) != ("e2b", "images")),
    )
    for name in TEXT
    for kind in BATCHES
    for side in (("right", "left") if kind == "images" and name in ("31b", "12b") else ("left",))
    if name == "e2b" or kind in ("images", "video") or (name == "12b" and kind != "text")
]
# What each kind of batch is made into soft tokens by.
USED = {
    "images": {"vision_tower", "embed_vision"},
    "video": {"vision_tower", "embed_vision"},
    "sound": {"audio_tower", "embed_audio"},
    "all": set(TOWERS),
    "text": set(),
}


@pytest.mark.parametrize("name, kind, side", CASES)
def test_full_fine_tuning_equals_stock(name: str, kind: str, side: str, device: torch.device) -> None:
    model = build(name).to(device)
    batch = batch_for(model, kind, side)
    stock = compare(model, batch)
    trained = {tower for tower in TOWERS if any(f".{tower}." in key for key in stock)}
    assert trained == {tower for tower in USED[kind] if hasattr(model.model, tower)}
    if kind in ("images", "video"):
        causal = logits(model, {**batch, "mm_token_type_ids": None})
        assert (relative_error(causal, stock["logits"]) > 1e-2) == (name in VISION)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, checkpointing, towers",
    [(name, trained, trained) for name in ("e2b", "26b-a4b", "12b") for trained in (False, True)]
    + [("e2b", True, False)],
)
def test_lora_equals_stock(name: str, checkpointing: bool, towers: bool, device: torch.device) -> None:
    model = adapt(build(name)).to(device)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for key, parameter in model.named_parameters():
        if any(tower in key for tower in TOWERS):
            parameter.requires_grad_(towers)
    batch = batch_for(model, "images" if not VIDEOS else "video" if name == "26b-a4b" else "all", "left")
    stock = compare(model, {**batch, "use_cache": not checkpointing})
    assert any(tower in key for key in stock for tower in TOWERS) == towers
    assert sum("lora_" in key for key in stock) == sum("lora_" in key for key, _ in model.named_parameters())


@pytest.mark.slow
@with_videos
@pytest.mark.parametrize("name", ["e2b", "12b"])
def test_a_tower_runs_the_norm_kernel_and_nothing_else(name: str, device: torch.device) -> None:
    """Its attention, rotation and MLP are other classes, whose in-place sums write to what the norms return."""
    model = build(name).to(device)
    batch = batch_for(model, "all")

    def features() -> Results:
        model.zero_grad()
        vision = torch.cat(model.get_image_features(batch["pixel_values"], batch["image_position_ids"]).pooler_output)
        audio = model.model.get_audio_features(batch["input_features"], batch["input_features_mask"]).pooler_output
        (vision.square().sum() + audio.pow(3).sum()).backward()
        grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        return {"vision": vision.detach(), "audio": audio.detach(), **grads}

    stock = features()
    before = counts()
    with fastgemma.patched():
        ours = features()
    norms = [
        module
        for key, module in model.named_modules()
        if isinstance(module, Gemma4RMSNorm | Gemma4UnifiedRMSNorm) and any(tower in key for tower in TOWERS)
    ]
    assert {feature: (fast, reasons) for feature, fast, reasons in gained(before) if fast or reasons} == {
        "rms_norm": (len(norms), {})
    }
    assert_float32(ours, stock)


@pytest.mark.slow
@with_videos
def test_features_made_beforehand(device: torch.device) -> None:
    model = build("e2b").to(device)
    batch = batch_for(model, "video", "left")
    image, image_at = batch.pop("pixel_values"), batch.pop("image_position_ids")
    video, video_at = batch.pop("pixel_values_videos"), batch.pop("video_position_ids")

    def features() -> Results:
        made = {
            "image": model.model.get_image_features(image, image_at),
            "video": model.model.get_video_features(video, video_at, batch["num_frames_per_video"]),
        }
        model.zero_grad()
        out = model(**batch, mm_encoder_outputs=made)
        out.loss.backward()
        grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        images = out.image_hidden_states  # from 5.24 on as they were handed in, each image by itself
        images = torch.cat(images) if isinstance(images, tuple) else images
        return {"loss": out.loss.detach(), "image": images.detach(), **grads}

    stock = features()
    with fastgemma.patched():
        ours = features()
    assert_float32(ours, stock)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["e2b", "31b", "12b"])
def test_generation_gives_stock_s_tokens(name: str, device: torch.device) -> None:
    model = build(name).to(device).eval()
    rows = ["3 i4 5 i10 2", "2 v2 1 v4 3" if VIDEOS else "2 i2 1 i4 3"]
    prompt = structures.multimodal_batch(model.config, rows, "left", device=device)
    prompt = {key: value for key, value in prompt.items() if key not in ("labels", "use_cache")}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    stock = model.generate(**prompt, **options)
    before = counts()
    with fastgemma.patched():
        ours = model.generate(**prompt, **options)
    assert torch.equal(ours.sequences, stock.sequences)
    for our_logits, stock_logits in zip(ours.logits, stock.logits, strict=True):
        assert relative_error(our_logits, stock_logits) <= 1e-5
    for feature, fast, fallbacks in gained(before):
        if feature == "attention":
            reason = "torch.float32" if device.type == "cuda" else "a key/value cache"
            assert not fast and fallbacks.keys() == {reason}
        else:
            assert not fallbacks and (fast or feature not in ALWAYS[:-1]), feature


@pytest.mark.parametrize("name", ["31b", "12b"])
def test_subclasses_keep_their_images(name: str, device: torch.device) -> None:
    """Sharding makes a subclass of each class that it wraps, in a module of its own."""
    model = build(name).to(device)
    base = Gemma4UnifiedModel if name == "12b" else Gemma4Model
    batch = batch_for(model, "images")
    stock = logits(model, batch)
    model.model.__class__ = type("Sharded", (base,), {"__module__": __name__})
    with fastgemma.patched():
        assert relative_error(logits(model, batch), stock) <= 1e-5


@attends_in_float32
@pytest.mark.parametrize("name", slow_after(1, ["31b", "12b"]))
def test_images_in_packed_rows(name: str, device: torch.device) -> None:
    """Stock's 31B looks for the second document's images where the first one has them. That is a fix's to mend."""
    model = build(name).to(device)
    documents = [
        structures.multimodal_batch(model.config, [row], seed=seed, device=device)
        for seed, row in enumerate(("3 i10 2", "4 i8 5 i10 1"))
    ]
    packed: dict[str, Any] = {
        key: torch.cat([document[key] for document in documents], dim=1) for key in ("input_ids", "mm_token_type_ids")
    }
    lengths = [document["input_ids"].shape[1] for document in documents]
    packed["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    most = max(document["pixel_values"].shape[1] for document in documents)
    for key, filling in (("pixel_values", 0), ("image_position_ids", -1)):
        padded = [
            torch.nn.functional.pad(document[key], (0, 0, 0, most - document[key].shape[1]), value=filling)
            for document in documents
        ]
        packed[key] = torch.cat(padded)
    packed["use_cache"] = False
    apart = torch.cat([logits(model, document) for document in documents])
    stock = logits(model, packed)[0]
    # Older transformers are right about both.
    assert relative_error(stock, apart) <= 1e-5 or name == "31b"
    with fastgemma.patched():
        assert relative_error(logits(model, packed)[0], apart) <= 1e-5
    before = counts()
    with fastgemma.patched(fixes=False):
        assert relative_error(logits(model, packed)[0], stock) <= 1e-5
    assert ("attention", 0, {"images in packed rows": 1}) in list(gained(before))


@pytest.mark.slow
@attends_in_float32
@pytest.mark.parametrize("side", ["right", "left"])
def test_eager_attention(side: str, device: torch.device) -> None:
    """The last padding on the left predicts the first token. Eager attention gives it the mean of all values."""
    model = build("31b").to(device)
    model.set_attn_implementation("eager")
    batch = batch_for(model, "images", side)
    if side == "right":
        compare(model, batch)
        return
    stock = step(model, batch)
    before = counts()
    with fastgemma.patched():
        ours = step(model, batch)
    assert ("attention", 0, {"padding on the left under eager attention": 2}) in list(gained(before))
    assert_float32(ours, stock)


@pytest.mark.slow
@attends_in_float32
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", ["31b", "12b"])
def test_stock_attention_over_our_masks(name: str, eager: bool, device: torch.device) -> None:
    """The kernel may turn out not to take the queries after the masks were made."""
    model = build(name).to(device).double()
    rows = BATCHES["images"]
    if eager:  # whose padding is not a number in float64
        rows = rows[:1]
        model.set_attn_implementation("eager")
    batch = structures.multimodal_batch(model.config, rows, "left", device=device)
    batch["pixel_values"] = batch["pixel_values"].double()
    stock = step(model, batch)
    before = counts()
    with fastgemma.patched():
        ours = step(model, batch)
    n_layers = len(model.model.language_model.layers)
    assert ("attention", 0, {"dtype torch.float64": 2 * n_layers}) in list(gained(before))
    for key, value in stock.items():
        assert relative_error(ours[key], value) <= 1e-12, key


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in TEXT if name != "26b-a4b"])
def test_bfloat16_is_as_exact_as_stock(name: str, device: torch.device) -> None:
    """Distance to float32 of the same weights, over 10 seeds: like stock's own, all gradients taken together.

    Not with experts: a rounding that sends a token to another one outweighs all others.
    """
    stock_errors: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for seed in range(10):
        model = build(name, seed).to(device, torch.bfloat16)
        batch = batch_for(model, "images", seed=seed)
        stock = step(model, batch)
        before = fastgemma.status()["attention"].fast_calls
        with fastgemma.patched():
            ours = step(model, batch)
        assert fastgemma.status()["attention"].fast_calls > before
        for key, truth in step(model.float(), batch).items():
            stock_errors.setdefault(key, []).append(relative_error(stock[key], truth))
            errors.setdefault(key, []).append(relative_error(ours[key], truth))
    for of in (["logits"], [key for key in errors if key not in ("loss", "logits")]):
        mean, stock_mean = (statistics.mean(statistics.mean(e[key]) for key in of) for e in (errors, stock_errors))
        assert mean <= STOCK_L2_FACTOR * stock_mean
