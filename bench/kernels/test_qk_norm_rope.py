"""Query norm + RoPE, key norm + RoPE and value norm of sliding (256) and global (512) layers, sequences of 2048."""

from __future__ import annotations

import models
import pytest
import torch
from kernel_inputs import activation
from kernel_timing import Subject
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4TextAttention,
    Gemma4TextRotaryEmbedding,
    apply_rotary_pos_emb,
)

from fastgemma.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference

SEQ_LEN = 2048
LAYERS = [("e2b", "sliding_attention"), ("e2b", "full_attention"), ("e4b", "sliding_attention")]
SHAPES = [(rows, *layer) for layer in LAYERS for rows in (2048, 32768)]


@pytest.mark.shapes(SHAPES, tiny=(7, "e2b", "full_attention"))
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("impl", ["fastgemma", "hf", "compile"])
def test_qk_norm_rope(measure, shape, impl, direction):
    rows, size, layer_type = shape
    device, seq_len = measure.device, min(rows, SEQ_LEN)
    config = models.text_config(size, tiny=measure.tiny)
    with torch.device("meta"):
        attention = Gemma4TextAttention(config, config.layer_types.index(layer_type)).requires_grad_(False)
    q_norm, k_norm, v_norm = (
        norm.to_empty(device=device).to(torch.bfloat16)
        for norm in (attention.q_norm, attention.k_norm, attention.v_norm)
    )
    q_norm.weight.normal_(1.0, 0.2)
    k_norm.weight.normal_(1.0, 0.2)
    head_dim = attention.head_dim
    widths = [attention.get_submodule(name).out_features for name in ("q_proj", "k_proj", "v_proj")]
    turning = config.rope_parameters[layer_type].get("partial_rotary_factor", 1.0)
    cos, sin = Gemma4TextRotaryEmbedding(config).to(device)(
        torch.empty(0, dtype=torch.bfloat16, device=device), torch.arange(seq_len, device=device)[None], layer_type
    )
    constants = (cos, sin, q_norm.weight, k_norm.weight, head_dim, int(turning * head_dim))

    def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As `Gemma4TextAttention.forward` has it."""
        q, k, v = (x.view(*x.shape[:-1], -1, head_dim) for x in (q, k, v))
        q = apply_rotary_pos_emb(q_norm(q), cos, sin, unsqueeze_dim=2)
        return q, apply_rotary_pos_emb(k_norm(k), cos, sin, unsqueeze_dim=2), v_norm(v)

    run = measure.choose(
        impl,
        fastgemma=lambda q, k, v: qk_norm_rope(q, k, v, *constants),
        hf=stock,
        compiled=rows == 32768 and size == "e2b",
    )
    measure(
        Subject(lambda: [activation(rows // seq_len, seq_len, width, device=device) for width in widths], run),
        op="qk_norm_rope",
        impl=impl,
        shape=[rows, *(width // head_dim for width in widths[:2]), head_dim],
        direction=direction,
        reference=lambda q, k, v: qk_norm_rope_reference(q, k, v, *constants),
        num_bytes=(4 if direction == "forward" else 6) * rows * sum(widths),
    )
