"""A model and a batch for `python -m fastgemma verify PATH`, from local files alone."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgemma.demo.plan import gpu_problem
from fastgemma.demo.text import COOKING, STORIES
from fastgemma.kernels.backend import interpreting
from fastgemma.verification.measure import VerifyError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# A new adapter's B is zero, and with it every gradient of A: nothing would be seen of them. Trained ones are about so.
_B_SCALE = 0.01


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    path: Path
    text: Path | None
    seq_len: int
    rows: int
    four_bit: bool
    rank: int
    dtype: str  # "auto" or a key of _DTYPES
    device: str  # "auto", "cuda" or "cpu"

    @property
    def is_adapter(self) -> bool:
        return (self.path / "adapter_config.json").is_file()


def load(request: Request) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model as it goes into training, and a batch of text.

    Raises:
        VerifyError: a wrong option, missing files or packages, or a device without kernels.
    """
    device = _device(request.device)
    if request.dtype not in ("auto", *_DTYPES):
        raise VerifyError(f"fastgemma: --dtype {request.dtype} is none of auto, {', '.join(_DTYPES)}.")
    auto = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = _DTYPES.get(request.dtype, auto)
    if not request.path.is_dir():
        raise VerifyError(
            f"fastgemma: {request.path} is not a directory. Pass one that holds config.json, or adapter_config.json; "
            "a model of the hub lies in its local cache after `hf download NAME`, which prints the directory."
        )
    if request.four_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise VerifyError("fastgemma: --4bit needs bitsandbytes: pip install bitsandbytes")
    if request.four_bit and not request.rank and not request.is_adapter:
        raise VerifyError("fastgemma: weights in 4 bits cannot be trained: leave out --4bit, or pass --rank 16.")
    try:
        return _model(request, device, dtype), _batch(request)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise VerifyError(
            f"fastgemma: {request.path} could not be loaded, so nothing was verified: {error}\nThe directory must hold "
            "a Gemma 4 model with its tokenizer, or an adapter whose base model is on this machine; nothing is "
            "downloaded."
        ) from error


def _device(name: str) -> torch.device:
    if name not in ("auto", "cuda", "cpu"):
        raise VerifyError(f"fastgemma: --device {name} is none of auto, cuda, cpu.")
    problem = gpu_problem()
    if name == "cuda" and problem:
        raise VerifyError(f"fastgemma: the kernels cannot run on a GPU here: {problem}.")
    if name != "cpu" and problem is None:
        return torch.device("cuda", torch.cuda.current_device())
    if not interpreting():
        raise VerifyError(
            f"fastgemma: kernels run on a GPU ({problem or '--device cpu was asked for'}). A small model can be "
            "verified on the CPU, in Triton's interpreter: start the same command with TRITON_INTERPRET=1 before it."
        )
    return torch.device("cpu")


def _model(request: Request, device: torch.device, dtype: torch.dtype) -> Any:
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    base = _base(request)
    config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
    kind = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
    settings: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "local_files_only": True}
    if request.four_bit:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = kind.from_pretrained(base, **settings)
    if request.is_adapter:
        return PeftModel.from_pretrained(model, str(request.path), is_trainable=True, local_files_only=True)
    if not request.rank:
        return model
    lora = LoraConfig(r=request.rank, lora_alpha=request.rank, target_modules=_PROJECTIONS, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    adapted = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=_B_SCALE)
    return adapted


def _base(request: Request) -> str:
    """Where the base model is: the directory itself, or what an adapter names."""
    if not request.is_adapter:
        return str(request.path)
    return str(json.loads((request.path / "adapter_config.json").read_text())["base_model_name_or_path"])


def _batch(request: Request) -> dict[str, torch.Tensor]:
    """Consecutive pieces of the text, one to a row; a short text is repeated."""
    from transformers import AutoTokenizer

    text = "\n".join((*STORIES, *COOKING)) if request.text is None else request.text.read_text(encoding="utf-8")
    holder = request.path if (request.path / "tokenizer_config.json").is_file() else _base(request)
    tokens = AutoTokenizer.from_pretrained(str(holder), local_files_only=True)(text)["input_ids"]
    if len(tokens) < 2:
        raise VerifyError(f"fastgemma: {request.text} holds no text to train on.")
    needed = request.rows * request.seq_len
    ids = torch.tensor((tokens * (needed // len(tokens) + 1))[:needed]).view(request.rows, request.seq_len)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
