"""The patch table: what is replaced, by what, under which feature."""

from __future__ import annotations

from fastgemma.patches.attention import make_attention
from fastgemma.patches.decoder_layer import make_decoder_layer
from fastgemma.patches.engine import Engine, Row
from fastgemma.patches.loss import make_head_forward
from fastgemma.patches.mlp import make_mlp
from fastgemma.patches.norms import make_norm
from fastgemma.patches.trl_head import make_add_fused_lm_head

FAMILIES = {
    "Gemma4": "transformers.models.gemma4.modeling_gemma4",
    "Gemma4Unified": "transformers.models.gemma4_unified.modeling_gemma4_unified",
}


def _family_rows(prefix: str, module: str) -> list[Row]:
    layer_parameters = ("hidden_states", "shared_kv_states", "position_embeddings", "attention_mask", "position_ids")
    head_parameters = ("input_ids", "attention_mask", "labels", "logits_to_keep", "kwargs")
    return [
        Row(("rms_norm",), module, f"{prefix}RMSNorm.forward", make_norm, ("hidden_states",)),
        Row(("geglu", "lora"), module, f"{prefix}TextMLP.forward", make_mlp, ("x",)),
        Row(
            ("rope", "lora"),
            module,
            f"{prefix}TextAttention.forward",
            make_attention,
            ("hidden_states", "position_embeddings", "attention_mask", "shared_kv_states", "past_key_values"),
        ),
        Row(
            ("rms_norm", "geglu", "lora"),
            module,
            f"{prefix}TextDecoderLayer.forward",
            make_decoder_layer(lambda: ENGINE),
            layer_parameters,
        ),
        Row(("cross_entropy",), module, f"{prefix}ForCausalLM.forward", make_head_forward, head_parameters),
        Row(
            ("cross_entropy",), module, f"{prefix}ForConditionalGeneration.forward", make_head_forward, head_parameters
        ),
    ]


ROWS = [
    *(row for prefix, module in FAMILIES.items() for row in _family_rows(prefix, module)),
    Row(
        ("cross_entropy",),
        "trl.trainer.utils",
        "add_fused_lm_head",
        make_add_fused_lm_head,
        ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
        aliases="trl",
        requires="trl",
    ),
]

ENGINE = Engine(ROWS)
