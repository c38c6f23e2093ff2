"""Sources that the patch table was tested with; written by tests/portability/fingerprint.py."""

FINGERPRINTS: dict[str, frozenset[str]] = {
    "accelerate.utils.operations:send_to_device": frozenset({"303c670335aa", "6dec6c3cf818"}),
    "bitsandbytes.optim.optimizer:Optimizer2State.update_step": frozenset({"81160385c28e"}),
    "peft.tuners.tuners_utils:BaseTuner.inject_adapter": frozenset({"3413a54648d5"}),
    "peft.utils.other:prepare_model_for_kbit_training": frozenset({"7bc99efe4ace"}),
    "transformers.models.gemma4.modeling_gemma4:Gemma4ForCausalLM.forward": frozenset(
        {
            "1820d7908113",
            "2cdb68fbecbe",
            "5b419e59a379",
            "70b28f818850",
            "a5aba0768819",
        }
    ),
    "transformers.models.gemma4.modeling_gemma4:Gemma4ForConditionalGeneration.forward": frozenset(
        {
            "582d840b3d62",
            "9516165605eb",
            "d1f2e3a82dfb",
            "dc7aa2e918b7",
            "f25f14176e1e",
            "f3000e9dd509",
        }
    ),
    "transformers.models.gemma4.modeling_gemma4:Gemma4Model.forward": frozenset(
        {
            "0a0a5ef9d484",
            "350e02b42faa",
            "3bf134ab1ef9",
            "c69ef2c49e6b",
            "deae6208843a",
            "e304a14256bf",
        }
    ),
    "transformers.models.gemma4.modeling_gemma4:Gemma4RMSNorm.forward": frozenset({"57a73970517a"}),
    "transformers.models.gemma4.modeling_gemma4:Gemma4TextAttention.forward": frozenset(
        {
            "38bfef39fad6",
            "47e0d63813aa",
            "e827c5e47e2e",
        }
    ),
    "transformers.models.gemma4.modeling_gemma4:Gemma4TextDecoderLayer.forward": frozenset(
        {
            "6614fbd883e1",
            "6c15217ad306",
            "8da0ac7a110c",
        }
    ),
    "transformers.models.gemma4.modeling_gemma4:Gemma4TextMLP.forward": frozenset({"7d2027d4464e"}),
    "transformers.models.gemma4.modeling_gemma4:Gemma4TextModel.__init__": frozenset({"1a0025cff8cf", "37a0d6e1813c"}),
    "transformers.models.gemma4.modeling_gemma4:Gemma4TextModel.forward": frozenset(
        {
            "09496d9a5cff",
            "a117f9985267",
            "ae298df43b14",
        }
    ),
    "transformers.models.gemma4.modeling_gemma4:Gemma4TextModel.get_per_layer_inputs": frozenset(
        {
            "31c7dc8f0362",
            "4c6da2529f65",
        }
    ),
    "transformers.models.gemma4.modeling_gemma4:Gemma4TextModel.project_per_layer_inputs": frozenset({"da85b4c998ff"}),
    "transformers.models.gemma4_unified.modeling_gemma4_unified:Gemma4UnifiedForCausalLM.forward": frozenset(
        {
            "203799cfd03b",
            "afcb987e705b",
            "d0bd31fd5e95",
            "f62e963aeb68",
        }
    ),
    "transformers.models.gemma4_unified.modeling_gemma4_unified:Gemma4UnifiedForConditionalGeneration.forward": frozenset(
        {
            "0685bb4dd557",
            "2794f1383b4b",
            "5764cdb9f960",
            "670635951269",
            "a11f2a05c515",
            "faa4dccb37e6",
        }
    ),
    "transformers.models.gemma4_unified.modeling_gemma4_unified:Gemma4UnifiedModel.forward": frozenset(
        {
            "063125d2335f",
            "1c5f4ad1ee96",
            "57d696e75d14",
            "726fdf5de4ce",
            "ce04645160a6",
            "d550c6f2ebf2",
        }
    ),
    "transformers.models.gemma4_unified.modeling_gemma4_unified:Gemma4UnifiedRMSNorm.forward": frozenset(
        {
            "57a73970517a",
        }
    ),
    "transformers.models.gemma4_unified.modeling_gemma4_unified:Gemma4UnifiedTextAttention.forward": frozenset(
        {
            "38bfef39fad6",
            "47e0d63813aa",
            "e827c5e47e2e",
        }
    ),
    "transformers.models.gemma4_unified.modeling_gemma4_unified:Gemma4UnifiedTextDecoderLayer.forward": frozenset(
        {
            "0218acb005e5",
            "55c32c6f0b42",
        }
    ),
    "transformers.models.gemma4_unified.modeling_gemma4_unified:Gemma4UnifiedTextMLP.forward": frozenset(
        {
            "7d2027d4464e",
        }
    ),
    "transformers.models.gemma4_unified.modeling_gemma4_unified:Gemma4UnifiedTextModel.forward": frozenset(
        {
            "35d530272228",
            "3b7b862ad8fa",
            "91fd4e2250f3",
        }
    ),
    "transformers.quantizers.base:HfQuantizer.get_modules_to_not_convert": frozenset({"639e53e9ba42"}),
    "trl.trainer.utils:add_fused_lm_head": frozenset({"65d22e63e487", "c309684c7d75"}),
}
