"""The per-layer-embedding table left in the checkpoint file: stock's numbers, and no trace of it on the device."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate.utils
import peft
import pytest
import structures
import torch
from datasets import Dataset
from kernel_checks import same_bits
from memory_maps import mapped_from, on_linux
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BatchEncoding,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Trainer,
    TrainingArguments,
)
from transformers.models.gemma4 import modeling_gemma4

import fastgemma
from fastgemma.patches import per_layer_embeddings
from fastgemma.patches.engine import PatchError
from fastgemma.patches.host_copies import host_copy, remember
from fastgemma.patches.per_layer_embeddings import HostScaledEmbedding

KEY = "model.embed_tokens_per_layer.weight"
STOCK: dict[str, Any] = dict.fromkeys(fastgemma.status(), False)
HOST: dict[str, Any] = {**STOCK, "per_layer_embeddings": "host"}
IDS = torch.tensor([[2, 5, 300, 17, 17, 42], [0, 0, 2, 9, 306, 3]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model in bfloat16, in one file."""
    path = tmp_path_factory.mktemp("text")
    structures.build("e2b").to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text model inside a multimodal one, whose towers nothing here runs."""
    path = tmp_path_factory.mktemp("multimodal")
    structures.multimodal().to(torch.bfloat16).save_pretrained(path)
    return path


def load(path: Path, cls: Any = Gemma4ForCausalLM, features: dict[str, Any] = HOST, **options: Any) -> Any:
    with fastgemma.patched(**features):
        return cls.from_pretrained(path, **options)


def text_model(model: Any) -> Any:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return getattr(inner.model, "language_model", inner.model)


def table_of(model: Any) -> Any:
    return text_model(model).embed_tokens_per_layer


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def without(model: nn.Module, name: str) -> bool:
    """Whether nothing that walks the model's tensors meets one of this name."""
    return not any(path.endswith(name) for path, _ in [*model.named_parameters(), *model.named_buffers()])


# Loading


@on_linux
def test_the_table_stays_in_the_file(checkpoint: Path) -> None:
    model = load(checkpoint)
    table = table_of(model)
    assert type(table) is HostScaledEmbedding and isinstance(table, modeling_gemma4.Gemma4TextScaledWordEmbedding)
    assert mapped_from(table.weight) == str(checkpoint / "model.safetensors")
    assert type(table.weight) is torch.Tensor and not table.weight.requires_grad
    assert without(model, "embed_tokens_per_layer.weight")
    assert KEY in model.state_dict()
    assert getattr(model, "hf_device_map", None) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_stock_s_bit_for_bit(checkpoint: Path, dtype: torch.dtype) -> None:
    stock = load(checkpoint, features=STOCK, dtype=dtype)
    model = load(checkpoint, dtype=dtype)
    assert type(table_of(stock)) is modeling_gemma4.Gemma4TextScaledWordEmbedding
    assert table_of(model).weight.dtype == torch.bfloat16, "the file's dtype: a cast would be a copy"
    expected = logits(stock)
    assert expected.dtype == dtype
    assert same_bits(logits(model), expected)
    with fastgemma.patched(**HOST):
        assert same_bits(logits(model), expected)


@on_linux
def test_multimodal_model(multimodal: Path) -> None:
    stock = load(multimodal, Gemma4ForConditionalGeneration, STOCK)
    model = load(multimodal, Gemma4ForConditionalGeneration)
    assert mapped_from(table_of(model).weight) == str(multimodal / "model.safetensors")
    assert without(model, "embed_tokens_per_layer.weight")
    assert same_bits(logits(model), logits(stock))


@on_linux
def test_sharded_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    stock = load(checkpoint, features=STOCK)
    stock.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = load(tmp_path)
    assert (mapped_from(table_of(model).weight) or "").startswith(str(tmp_path))
    assert same_bits(logits(model), logits(stock))


@on_linux
def test_without_memory_maps_the_table_is_a_private_copy_on_the_host(checkpoint: Path) -> None:
    model = load(checkpoint, disable_mmap=True)
    table = table_of(model)
    assert type(table) is HostScaledEmbedding and table.weight.device.type == "cpu"
    assert mapped_from(table.weight) != str(checkpoint / "model.safetensors")
    assert same_bits(logits(model), logits(load(checkpoint, features=STOCK)))


@pytest.mark.parametrize("with_shape", [None, (20, 6 * 64)])
def test_checkpoint_without_the_table_initialises_it_as_stock(
    checkpoint: Path, tmp_path: Path, with_shape: tuple[int, int] | None
) -> None:
    """Missing, or of another shape: reported as stock reports it, and an ordinary random table."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[KEY]
    if with_shape is not None:
        tensors[KEY] = torch.zeros(with_shape, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    torch.manual_seed(0)
    stock, expected = load(tmp_path, features=STOCK, **options)
    torch.manual_seed(0)
    model, info = load(tmp_path, **options)
    assert info == expected
    assert same_bits(table_of(model).weight, table_of(stock).weight)
    assert type(table_of(model)) is type(table_of(stock))
    assert same_bits(logits(model), logits(stock))


def test_text_model_on_a_multimodal_checkpoint(multimodal: Path) -> None:
    """Whatever stock makes of the other prefix, the same tensors are missing."""
    options = {"output_loading_info": True}
    torch.manual_seed(0)
    stock, expected = load(multimodal, features=STOCK, **options)
    torch.manual_seed(0)
    model, info = load(multimodal, **options)
    assert info == expected
    assert same_bits(logits(model), logits(stock))


@pytest.mark.parametrize("mode", ["auto", True, "gpu", False])
def test_modes_that_leave_stock_alone_without_a_small_gpu(checkpoint: Path, mode: bool | str) -> None:
    if torch.cuda.is_available() and mode in ("auto", True):
        pytest.skip("a CUDA device may want the table on the host")
    model = load(checkpoint, features={**STOCK, "per_layer_embeddings": mode})
    assert type(table_of(model)) is modeling_gemma4.Gemma4TextScaledWordEmbedding
    assert KEY in dict(model.named_parameters())


@pytest.mark.parametrize(("total", "expected"), [(8 << 30, True), (80 << 30, False)])
def test_auto_goes_by_the_size_of_the_card(monkeypatch: pytest.MonkeyPatch, total: int, expected: bool) -> None:
    op = fastgemma.patches.engine.Op("per_layer_embeddings", "", active=True, mode="auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: 1.0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: type("Properties", (), {"total_memory": total})
    )
    assert per_layer_embeddings._wants_host(op, int(4.4 * 2**30)) is expected
    op.mode = "gpu"
    assert not per_layer_embeddings._wants_host(op, int(4.4 * 2**30))


def test_a_model_built_from_its_config_keeps_its_table() -> None:
    with fastgemma.patched(**HOST):
        model = structures.build("e2b")
    assert type(table_of(model)) is modeling_gemma4.Gemma4TextScaledWordEmbedding


class _Seen(Exception):
    """Ends a load once what it asks for is known."""


@pytest.fixture
def device_map_of(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Features and from_pretrained's options -> the device map with which the loader would read the files."""
    seen: list[Any] = []

    def loader(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None) -> Any:
        seen.append(load_config.device_map)
        raise _Seen

    monkeypatch.setattr(modeling_gemma4.Gemma4PreTrainedModel, "_load_pretrained_model", staticmethod(loader))

    def ask(features: dict[str, Any], **options: Any) -> Any:
        with pytest.raises(_Seen):
            load(checkpoint, features=features, **options)
        return None if seen[-1] is None else dict(seen[-1])

    return ask


def test_the_device_map_sends_the_table_to_the_host(device_map_of: Callable[..., Any]) -> None:
    assert device_map_of(HOST, device_map={"": "cpu"}) == {"": "cpu", KEY: "cpu"}
    assert device_map_of(HOST, device_map={"": 0}) == {"": 0, KEY: "cpu"}
    assert device_map_of(STOCK, device_map={"": 0}) == {"": 0}
    assert device_map_of(HOST, device_map=None) is None


def test_auto_does_not_count_the_table(checkpoint: Path, device_map_of: Callable[..., Any]) -> None:
    """A card that holds the model without its table gets all of it; stock would split it."""
    tensors = load_file(checkpoint / "model.safetensors")
    room = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    options = {"device_map": "auto", "max_memory": {0: room, "cpu": 10**9}}
    assert set(device_map_of(STOCK, **options).values()) == {0, "cpu"}
    assert device_map_of(HOST, **options) == {"": 0, KEY: "cpu"}


# Saving, copying, moving


@pytest.mark.parametrize("over_itself", [False, True])
def test_saved_checkpoint_is_stock_s(checkpoint: Path, tmp_path: Path, over_itself: bool) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    model = load(source)
    expected = logits(model)
    target = source if over_itself else tmp_path / "saved"
    model.save_pretrained(target)
    assert same_bits(logits(model), expected), "the loaded model lost its table"
    load(checkpoint, features=STOCK).save_pretrained(tmp_path / "stock")
    ours, stock = (load_file(path / "model.safetensors") for path in (target, tmp_path / "stock"))
    assert ours.keys() == stock.keys() and KEY in ours
    assert all(same_bits(ours[name], tensor) for name, tensor in stock.items())
    assert same_bits(logits(load(target, features=STOCK)), expected)
    assert same_bits(logits(load(target)), expected)


def test_state_dict_is_stock_s(checkpoint: Path) -> None:
    ours, stock = load(checkpoint).state_dict(), load(checkpoint, features=STOCK).state_dict()
    assert ours.keys() == stock.keys()
    assert all(same_bits(ours[name], tensor) for name, tensor in stock.items())


def test_load_state_dict_is_strict(checkpoint: Path) -> None:
    model, other = load(checkpoint), load(checkpoint, features=STOCK)
    other.load_state_dict(structures.build("e2b", seed=5).state_dict())
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    before = load_file(checkpoint / "model.safetensors")[KEY].clone()
    assert str(model.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert same_bits(logits(model), logits(other))
    assert same_bits(load_file(checkpoint / "model.safetensors")[KEY], before), "the file was written"

    missing = {name: tensor for name, tensor in state.items() if name != KEY}
    with pytest.raises(RuntimeError, match=f'Missing key.*"{KEY}"'):
        model.load_state_dict(missing)
    assert model.load_state_dict(missing, strict=False).missing_keys == [KEY]
    with pytest.raises(RuntimeError, match=f"size mismatch for {KEY}"):
        model.load_state_dict({**state, KEY: state[KEY][:5]})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**state, "model.embed_tokens_per_layer.bias": torch.zeros(1)})


def test_deepcopy_shares_the_table(checkpoint: Path) -> None:
    model = load(checkpoint)
    clone = copy.deepcopy(model)
    assert table_of(clone) is not table_of(model)
    assert table_of(clone).weight.data_ptr() == table_of(model).weight.data_ptr()
    assert text_model(clone).norm.weight.data_ptr() != text_model(model).norm.weight.data_ptr()
    assert same_bits(logits(clone), logits(model))


def test_moves_and_casts_pass_it_by(checkpoint: Path) -> None:
    model = load(checkpoint)
    pointer = table_of(model).weight.data_ptr()
    model.to(torch.float32)
    assert table_of(model).weight.dtype == torch.bfloat16
    assert same_bits(logits(model), logits(load(checkpoint, features=STOCK).to(torch.float32)))
    model.to("meta")
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert table_of(model).weight.data_ptr() == pointer


@pytest.mark.parametrize("mean_resizing", [False, True])
@pytest.mark.parametrize("size", [structures.VOCAB + 9, structures.VOCAB - 7])
def test_resized_embeddings(checkpoint: Path, size: int, mean_resizing: bool) -> None:
    models = [load(checkpoint, features=STOCK), load(checkpoint)]
    for model in models:
        torch.manual_seed(0)
        model.resize_token_embeddings(size, mean_resizing=mean_resizing)
    stock, ours = models
    assert table_of(ours).weight.shape == table_of(stock).weight.shape == (size, 6 * 64)
    assert same_bits(table_of(ours).weight, table_of(stock).weight.detach())
    ids = IDS.clamp(max=size - 1)
    assert same_bits(logits(ours, ids), logits(stock, ids))


def test_generation(checkpoint: Path) -> None:
    stock, ours = load(checkpoint, features=STOCK), load(checkpoint)
    inputs = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
    expected = stock.generate(**inputs, max_new_tokens=6, do_sample=False)
    with fastgemma.patched(**HOST):
        assert torch.equal(ours.generate(**inputs, max_new_tokens=6, do_sample=False), expected)


# Training


def lora(model: Any) -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def train(model: Any, tmp_path: Path) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, structures.VOCAB, (4, 7)).tolist()]
    trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_lora_training(checkpoint: Path, tmp_path: Path) -> None:
    losses = []
    for features in (STOCK, HOST):
        with fastgemma.patched(**features):
            model = lora(Gemma4ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
            torch.manual_seed(1)
            losses.append(train(model, tmp_path))
    assert type(table_of(model)) is HostScaledEmbedding
    assert len(losses[0]) == 2 and losses[1] == losses[0]


def test_training_the_embeddings_is_refused(checkpoint: Path) -> None:
    model = load(checkpoint, dtype=torch.float32).train()
    with fastgemma.patched(**HOST):
        with pytest.raises(PatchError, match=r'Freeze the embeddings.*per_layer_embeddings="gpu"'):
            model(IDS, labels=IDS)
        with torch.no_grad():
            model(IDS)
        model.eval()(IDS)
        text_model(model).embed_tokens.weight.requires_grad_(False)
        model.train()(IDS, labels=IDS).loss.backward()


def test_training_a_copy_of_the_table_is_refused(checkpoint: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens_per_layer"])
    model = peft.get_peft_model(load(checkpoint, dtype=torch.float32), config).train()
    with fastgemma.patched(**HOST):
        with pytest.raises(PatchError, match=r'per_layer_embeddings="gpu"'):
            model(IDS, labels=IDS)
        with torch.no_grad():
            model(IDS)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [5, 17]},
        {"trainable_token_indices": {"embed_tokens": [5], "embed_tokens_per_layer": [17]}},
        {"target_modules": ["embed_tokens", "embed_tokens_per_layer"]},
    ],
    ids=["all tokens", "some tokens", "some tokens of both", "lora"],
)
def test_embeddings_that_peft_trains(checkpoint: Path, options: dict[str, Any]) -> None:
    """As for new tokens: what is trained is PEFT's own, the table under it is not."""
    gradients = []
    for features in (STOCK, HOST):
        with fastgemma.patched(**features):
            model = Gemma4ForCausalLM.from_pretrained(checkpoint)
            torch.manual_seed(0)
            config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **options})
            model = peft.get_peft_model(model, config).train()
            model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    stock, ours = gradients
    assert stock.keys() == ours.keys() and any("embed_tokens" in name for name in stock)
    assert all(same_bits(ours[name], gradient) for name, gradient in stock.items())


def test_kbit_preparation_leaves_it_alone(checkpoint: Path) -> None:
    """PEFT's own, which assigns to the data of every parameter."""
    model = load(checkpoint)
    pointer = table_of(model).weight.data_ptr()
    peft.prepare_model_for_kbit_training(model)
    assert text_model(model).norm.weight.dtype == torch.float32
    assert (table_of(model).weight.data_ptr(), table_of(model).weight.dtype) == (pointer, torch.bfloat16)


# Ids on the host


def test_host_copies_are_forgotten_once_the_device_s_are_written() -> None:
    device_ids = IDS.to("meta")
    assert host_copy(IDS) is IDS
    assert host_copy(device_ids) is None
    remember(device_ids, IDS)
    assert host_copy(device_ids) is IDS
    assert host_copy(device_ids.clone()) is None
    device_ids.add_(1)
    assert host_copy(device_ids) is None


@pytest.mark.parametrize("container", [dict, BatchEncoding])
def test_accelerate_s_move_remembers_the_ids(container: Any) -> None:
    batch = container({"input_ids": IDS, "labels": IDS})
    assert host_copy(accelerate.utils.send_to_device(dict(batch), "meta")["input_ids"]) is None
    with fastgemma.patched(**HOST):
        # The names under which accelerate's own modules imported it are patched as well.
        for send in (accelerate.utils.send_to_device, accelerate.data_loader.send_to_device):
            sent = send(batch, torch.device("meta")) if container is dict else send(dict(batch), "meta")
            assert sent["input_ids"].is_meta and host_copy(sent["input_ids"]) is IDS
            assert host_copy(sent["labels"]) is None
        assert accelerate.utils.send_to_device(IDS, "meta").is_meta
        captured = accelerate.utils.send_to_device
    assert host_copy(captured({"input_ids": IDS}, "meta")["input_ids"]) is None


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """The ids with which rows are gathered, call by call."""
    seen: list[torch.Tensor] = []
    gather = per_layer_embeddings.gather_rows

    def record(table: torch.Tensor, indices: torch.Tensor, device: torch.device) -> torch.Tensor:
        seen.append(indices)
        return gather(table, indices, device)

    monkeypatch.setattr(per_layer_embeddings, "gather_rows", record)
    yield seen


def test_soft_tokens_become_padding_in_the_host_s_ids_too(
    multimodal: Path, looked_up: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = load(multimodal, Gemma4ForConditionalGeneration, STOCK)
    model = load(multimodal, Gemma4ForConditionalGeneration)
    ids = IDS.clone()
    ids[0, 1:3], ids[0, 4], ids[1, 4] = 1000, 1001, 1002
    expected = logits(stock, ids)
    assert same_bits(logits(model, ids), expected)
    looked_up.clear()

    host = ids.clone()  # stands for the host's copy of ids on a device
    monkeypatch.setattr(per_layer_embeddings, "host_copy", lambda tensor: host if tensor is ids else None)
    with fastgemma.patched(**HOST):
        assert same_bits(logits(model, ids), expected)
    (gathered,) = looked_up
    assert torch.equal(gathered, IDS.masked_fill(ids >= 1000, 0))
    assert table_of(model).pending_ids is None
    assert torch.equal(host, ids), "the host's ids were written"


def test_pending_ids_do_not_outlive_a_failed_forward(multimodal: Path) -> None:
    model = load(multimodal, Gemma4ForConditionalGeneration)
    handle = text_model(model).register_forward_pre_hook(lambda *args: 1 / 0)
    text_model(model).embed_tokens.register_forward_pre_hook(lambda *args: 1 / 0)
    with fastgemma.patched(**HOST), pytest.raises(ZeroDivisionError):
        logits(model)
    handle.remove()
    assert table_of(model).pending_ids is None


# A model that was there before patch()


@on_linux
@pytest.mark.parametrize("changed", [False, True])
def test_moving_the_table_of_a_loaded_model(checkpoint: Path, caplog: pytest.LogCaptureFixture, changed: bool) -> None:
    """The file's bytes where they are the model's, else a copy of the model's."""
    model = load(checkpoint, features=STOCK)
    table_of(model).weight.data = table_of(model).weight.data.clone()  # the loader's is a view of the file already
    if changed:
        with torch.no_grad():
            table_of(model).weight[17] += 1.0
    expected, weight = logits(model), table_of(model).weight.detach().clone()
    with caplog.at_level(logging.WARNING, "fastgemma"):
        per_layer_embeddings._move_to_host(table_of(model), text_model(model).config)
    (record,) = caplog.records
    assert ("copied to host memory" if changed else "mapped from its checkpoint") in record.getMessage()
    table = table_of(model)
    assert type(table) is HostScaledEmbedding
    assert (mapped_from(table.weight) == str(checkpoint / "model.safetensors")) is not changed
    assert same_bits(table.weight, weight) and same_bits(logits(model), expected)
    assert without(model, "embed_tokens_per_layer.weight")


@on_linux
def test_moving_the_table_of_a_loaded_multimodal_model(multimodal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text model's config does not say where it was loaded from; its own does."""
    model = load(multimodal, Gemma4ForConditionalGeneration, STOCK).requires_grad_(False)
    table_of(model).weight.data = table_of(model).weight.data.clone()
    expected = logits(model)
    monkeypatch.setattr(per_layer_embeddings, "_wants_host", lambda op, size: True)
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", property(lambda self: True), raising=False)
    with fastgemma.patched(**HOST):
        ours = logits(model)
    assert mapped_from(table_of(model).weight) == str(multimodal / "model.safetensors")
    assert same_bits(ours, expected)


def test_checkpoint_files_of_a_hub_model_come_from_its_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        per_layer_embeddings,
        "try_to_load_from_cache",
        lambda repo, name, revision: str(checkpoint / name) if (repo, revision) == ("some/model", "abc") else None,
    )
    config = Gemma4TextConfig()
    files = per_layer_embeddings._checkpoint_files
    config._name_or_path, config._commit_hash = "some/model", "abc"
    assert files(config) == [str(checkpoint / "model.safetensors")]
    config._name_or_path = "other/model"
    assert files(config) == []
    monkeypatch.undo()
    for path in ("", str(tmp_path / "gone" / "since"), "not a repository"):
        config._name_or_path = path
        assert files(config) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("before", [False, True])
def test_on_a_gpu(checkpoint: Path, before: bool) -> None:
    """Loaded before or after patch(): the table is on the host after one forward, the logits are stock's."""
    stock = load(checkpoint, features=STOCK, device_map={"": 0})
    ids = IDS.to("cuda")
    expected = logits(stock, ids)
    with fastgemma.patched(**HOST):
        model = stock if before else Gemma4ForCausalLM.from_pretrained(checkpoint, device_map={"": 0})
        model.requires_grad_(False)
        assert same_bits(logits(model, ids), expected)
        assert type(table_of(model)) is HostScaledEmbedding and not table_of(model).weight.is_cuda
        assert same_bits(logits(model, ids), expected)
        sent = accelerate.utils.send_to_device({"input_ids": IDS}, "cuda")
        assert same_bits(logits(model, sent["input_ids"]), expected)
