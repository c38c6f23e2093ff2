"""Checkpoint files that are damaged, missing, replaced, cut or read-only, and disks that are full."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structures
import torch
from kernel_checks import same_bits
from memory_maps import mapped_from, on_linux
from processes import can_fork, in_forked_child
from rich.console import Console
from transformers import Gemma4ForCausalLM

import fastgemma
from fastgemma.demo import run
from fastgemma.demo.plan import CPU_PLAN, DemoError
from fastgemma.patches import per_layer_embeddings

KEY = "model.embed_tokens_per_layer.weight"
HOST: dict[str, Any] = {**dict.fromkeys(fastgemma.status(), False), "per_layer_embeddings": "host"}
IDS = torch.arange(structures.VOCAB)[None]  # every row of the table


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    structures.build("e2b").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    structures.build("e2b").to(torch.bfloat16).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    return tmp_path / "sharded"


def load(path: Path, **features: Any) -> Any:
    with fastgemma.patched(**{**HOST, **features}):
        return Gemma4ForCausalLM.from_pretrained(path)


def table_file(path: Path) -> Path:
    index = path / "model.safetensors.index.json"
    return path / (json.loads(index.read_text())["weight_map"][KEY] if index.exists() else "model.safetensors")


def off_the_file(model: Any) -> Any:
    """On a CPU the loader leaves every weight in the file; all but the table go where a GPU would have them."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def cut(path: Path, to: int = 50_000) -> None:
    """By default in the middle of the table."""
    os.truncate(path, to)


def damage_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:40] = b"<html>no such file</html>".ljust(32)
    path.write_bytes(data)


def swap_offsets(path: Path) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for entry in header.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = entry["data_offsets"][::-1]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b"") and None,
    "cut in its tensors": cut,
    "cut in its header": lambda path: cut(path, 100),
    "endless header": lambda path: path.write_bytes(b"\xff" * 100) and None,
    "no header": damage_header,
    "offsets that run backwards": swap_offsets,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_is_named(sharded: Path, damage: Callable[[Path], None]) -> None:
    whole = sharded.with_name("whole")
    shutil.copytree(sharded, whole)
    damage(table_file(sharded))
    with pytest.raises(fastgemma.PatchError, match="No model was loaded.*again") as raised:
        load(sharded)
    assert str(table_file(sharded)) in str(raised.value)
    assert same_bits(logits(load(whole)), logits(load(whole, per_layer_embeddings=False)))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_loaded_model_does_not_need_files_that_were_damaged_since(
    checkpoint: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Moved to the host at its first forward, its table is copied."""
    model = off_the_file(load(checkpoint, per_layer_embeddings=False))
    table = model.model.embed_tokens_per_layer
    expected = logits(model)
    damage(checkpoint / "model.safetensors")
    with caplog.at_level(logging.WARNING, "fastgemma"):
        per_layer_embeddings._move_to_host(table, model.model.config)
    assert "copied to host memory" in caplog.text
    assert mapped_from(table.weight) != str(checkpoint / "model.safetensors")
    assert same_bits(logits(model), expected)


@on_linux
@pytest.mark.parametrize("replaced", [False, True])
def test_deleting_or_replacing_the_file_is_harmless(checkpoint: Path, replaced: bool) -> None:
    expected = logits(load(checkpoint, per_layer_embeddings=False))
    model = load(checkpoint)
    file = checkpoint / "model.safetensors"
    if replaced:
        other = checkpoint / "other"
        other.write_bytes(b"something else")
        other.replace(file)
    else:
        shutil.rmtree(checkpoint)
    assert (mapped_from(model.model.embed_tokens_per_layer.weight) or "").startswith(str(file))
    assert same_bits(logits(model), expected)


@can_fork
@pytest.mark.parametrize("size", [0, 50_000])
def test_a_file_that_was_cut_is_noticed_before_it_is_read(checkpoint: Path, size: int) -> None:
    """Reading it would end the process, so a child does."""
    model = off_the_file(load(checkpoint))

    def forward() -> str:
        cut(checkpoint / "model.safetensors", size)
        with pytest.raises(fastgemma.PatchError) as raised:
            logits(model)
        return str(raised.value)

    message = in_forked_child(forward)
    assert str(checkpoint / "model.safetensors") in message
    assert "No loss was computed" in message and "disable_mmap=True" in message


def test_a_file_that_was_written_to_is_mentioned_once(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = off_the_file(load(checkpoint))
    expected = logits(model)
    file = checkpoint / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    with caplog.at_level(logging.WARNING, "fastgemma"):
        assert same_bits(logits(model), expected) and same_bits(logits(model), expected)
    (record,) = caplog.records
    assert f"{file} was written to after the model was loaded" in record.getMessage()
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    cut(file)  # nothing reads it any more
    assert same_bits(logits(model), expected)


# Full disks


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond `room` bytes: the operating system refuses, in whatever language the writer is."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@can_fork
def test_saving_over_itself_on_a_full_disk_loses_nothing(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    expected, before = logits(load(checkpoint, per_layer_embeddings=False)), file.read_bytes()

    def save() -> bool:
        model = load(checkpoint)
        with full_disk(file.stat().st_size // 2), pytest.raises(Exception, match="File too large"):
            model.save_pretrained(checkpoint)
        assert file.read_bytes() == before and same_bits(logits(load(checkpoint)), expected)
        assert same_bits(logits(model), expected)
        model.save_pretrained(checkpoint)  # there is room again
        return same_bits(logits(model), expected)

    assert in_forked_child(save)
    assert same_bits(logits(load(checkpoint)), expected)


def test_saving_over_itself_in_other_shards(sharded: Path) -> None:
    """transformers deletes the file that the table is mapped from, and writes others."""
    model, mapped = load(sharded), table_file(sharded)
    expected = logits(model)
    model.save_pretrained(sharded, max_shard_size="300KB")
    assert not mapped.exists() and table_file(sharded).exists()
    assert same_bits(logits(model), expected) and same_bits(logits(load(sharded)), expected)


RESULT: dict[str, Any] = {"losses": [1.0], "step_ms": [1.0], "status": {}}


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The demo's stages, which take no time and find nothing wrong."""
    seen: list[str] = []
    monkeypatch.setattr(run, "_run", lambda plan, work, stage, *_: seen.append(stage) or RESULT)
    monkeypatch.setattr(run, "print_results", lambda *_: None)
    monkeypatch.setattr(run, "verdict", lambda *_: [])
    return seen


PLAN = dataclasses.replace(CPU_PLAN, steps=1)


def test_the_demo_asks_first_whether_it_can_write(stages: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DemoError, match="Nothing was run.*--output"):
        run.run_demo(PLAN, tmp_path / "file" / "output", Console(quiet=True))
    assert not stages


@pytest.mark.parametrize("writer", ["draw", "write_text"])
def test_the_demo_on_a_full_disk(
    stages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run.run_demo(PLAN, tmp_path, Console(quiet=True))
    assert json.loads((tmp_path / "demo.json").read_text())["stock"] == RESULT
    if writer == "draw":
        monkeypatch.setattr(run, "draw", full)
    else:
        # The picture fits, and fills the disk.
        monkeypatch.setattr(run, "draw", lambda *_: monkeypatch.setattr(Path, "write_text", full))
    with pytest.raises(DemoError, match="No space left on device.*the comparison itself passed"):
        run.run_demo(PLAN, tmp_path, Console(quiet=True))
    assert len(stages) == 6


# Nothing can be written


@can_fork
@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd's threads, of which a GPU has its own, survive no fork")
def test_a_read_only_file_system(checkpoint: Path) -> None:
    """Loading, patching and a training step write nothing, anywhere."""
    structures.build("e2b", layer_types=["full_attention"], num_kv_shared_layers=0).save_pretrained(checkpoint)
    right = in_forked_child(lambda: _trained_loss(checkpoint))

    def read_only() -> float:
        sys.addaudithook(_refuse_to_write)
        return _trained_loss(checkpoint)

    assert in_forked_child(read_only) == right


def _trained_loss(checkpoint: Path) -> float:
    fastgemma.patch(per_layer_embeddings="host")
    model = Gemma4ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    loss = model(**structures.batch("padding", rows=1, seq_len=9)).loss
    loss.backward()
    return loss.item()


def _refuse_to_write(event: str, arguments: tuple[Any, ...]) -> None:
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "os.chmod")
    if event == "open" and arguments[0] != os.devnull and not isinstance(arguments[0], int):
        changes = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if changes:
        raise OSError(errno.EROFS, "Read-only file system", str(arguments[0]))
