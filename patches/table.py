"""The patch table: what is replaced, by what, under which feature."""

from __future__ import annotations

from fastgemma.patches import fixes, host_copies, per_layer_embeddings, per_layer_inputs
from fastgemma.patches.attention import make_attention
from fastgemma.patches.caches import CACHE
from fastgemma.patches.decoder_layer import make_decoder_layer
from fastgemma.patches.engine import Engine, Row
from fastgemma.patches.families import FAMILIES
from fastgemma.patches.fingerprints import FINGERPRINTS
from fastgemma.patches.layer_graphs import make_layer_call
from fastgemma.patches.loss import make_head_forward
from fastgemma.patches.mlp import make_mlp
from fastgemma.patches.norms import make_norm
from fastgemma.patches.optimizer import make_sync, make_update_step
from fastgemma.patches.trl_head import make_add_fused_lm_head
from fastgemma.patches.whole_layer import PARTS


def _family_rows(prefix: str, module: str) -> list[Row]:
    layer_parameters = ("hidden_states", "shared_kv_states", "position_embeddings", "attention_mask", "position_ids")
    head_parameters = ("input_ids", "attention_mask", "labels", "logits_to_keep", "kwargs")
    return [
        Row(("rms_norm",), module, f"{prefix}RMSNorm.forward", make_norm, ("hidden_states",), stands_in=True),
        Row(("geglu", "lora"), module, f"{prefix}TextMLP.forward", make_mlp, ("x",), stands_in=True),
        Row(
            ("rope", "lora", "attention"),
            module,
            f"{prefix}TextAttention.forward",
            make_attention,
            ("hidden_states", "position_embeddings", "attention_mask", "shared_kv_states", CACHE),
            stands_in=True,
        ),
        Row(
            (*PARTS, "attention"),
            module,
            f"{prefix}TextDecoderLayer.forward",
            make_decoder_layer(lambda: ENGINE),
            layer_parameters,
            stands_in=True,
        ),
        Row(
            ("cuda_graphs", "checkpointing", "attention", *PARTS),
            module,
            f"{prefix}TextDecoderLayer.__call__",
            make_layer_call,
        ),
        *(
            Row(
                ("cross_entropy",),
                module,
                f"{prefix}{head}.forward",
                make_head_forward,
                head_parameters,
                stands_in=True,
            )
            for head in ("ForCausalLM", "ForConditionalGeneration")
        ),
        Row(
            ("fixes", "checkpointing", "attention"),
            module,
            f"{prefix}TextModel.forward",
            fixes.make_model_forward,
            ("input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds"),
        ),
        Row(
            ("fixes", "attention"),
            module,
            f"{prefix}Model.forward",
            fixes.make_model_forward,
            ("input_ids", "attention_mask", "position_ids", CACHE, "mm_token_type_ids"),
        ),
        Row(
            ("checkpointing",),
            module,
            f"{prefix}PreTrainedModel.{fixes.CHECKPOINTING_ENABLE}",
            fixes.make_checkpointing_enable,
            (fixes.CHECKPOINTING_KWARGS,),
        ),
    ]


def _per_layer_embedding_rows() -> list[Row]:
    feature, module = ("per_layer_embeddings",), FAMILIES["Gemma4"]
    return [
        Row(feature, module, "Gemma4TextModel.__init__", per_layer_embeddings.make_init, ("config",)),
        Row(
            feature,
            module,
            "Gemma4PreTrainedModel._load_pretrained_model",
            per_layer_embeddings.make_load,
            ("model", "state_dict", "checkpoint_files", "load_config"),
        ),
        Row(
            feature,
            module,
            "Gemma4TextModel.get_per_layer_inputs",
            per_layer_embeddings.make_lookup,
            ("input_ids", "inputs_embeds"),
        ),
        Row(
            feature,
            module,
            "Gemma4TextModel.project_per_layer_inputs",
            per_layer_inputs.make_projection,
            ("inputs_embeds", "per_layer_inputs"),
        ),
        Row(
            feature,
            module,
            "Gemma4Model.forward",
            per_layer_embeddings.make_multimodal_forward,
            ("input_ids", "inputs_embeds"),
        ),
    ]


def _fix_rows() -> list[Row]:
    return [
        Row(
            ("fixes",),
            "peft.utils.other",
            "prepare_model_for_kbit_training",
            fixes.make_prepare_for_kbit,
            ("model",),
            aliases=("peft", "trl", "__main__"),
        ),
        Row(
            ("fixes",),
            "transformers.quantizers.base",
            "HfQuantizer.get_modules_to_not_convert",
            fixes.make_modules_to_not_convert,
            ("model", "skip_modules"),
        ),
        Row(
            ("fixes",),
            "peft.tuners.tuners_utils",
            "BaseTuner.inject_adapter",
            fixes.make_inject_adapter,
            ("model", "adapter_name"),
        ),
    ]


ROWS = [
    *(row for prefix, module in FAMILIES.items() for row in _family_rows(prefix, module)),
    *_per_layer_embedding_rows(),
    *_fix_rows(),
    Row(
        ("per_layer_embeddings", "attention"),
        "accelerate.utils.operations",
        "send_to_device",
        host_copies.make_send_to_device,
        ("tensor", "device"),
        aliases=("accelerate",),
        requires="accelerate",
    ),
    Row(
        ("optimizer",),
        "bitsandbytes.optim.optimizer",
        "sync_gpu",
        make_sync,
        ("t",),
        requires="bitsandbytes",
    ),
    Row(
        ("optimizer",),
        "bitsandbytes.optim.optimizer",
        "Optimizer2State.update_step",
        make_update_step,
        ("group", "p", "gindex", "pindex"),
        requires="bitsandbytes",
    ),
    Row(
        ("cross_entropy",),
        "trl.trainer.utils",
        "add_fused_lm_head",
        make_add_fused_lm_head,
        ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
        aliases=("trl",),
        requires="trl",
    ),
]

ENGINE = Engine(ROWS, FINGERPRINTS)
