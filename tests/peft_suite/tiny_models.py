"""Random models of a few thousand parameters under the hub names that PEFT's tests use.

`from_pretrained("owner/name")` prefers the folder owner/name of the working directory to the hub, so that nothing has
to be patched.
"""

from pathlib import Path

import torch
import transformers
from peft import LoraConfig

SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}

# name -> class and what its config needs beside the sizes
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        {"ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", {}),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {"rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", GROUPED),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", GROUPED),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", GROUPED),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        {"d_kv": 8, "d_ff": 64, "num_layers": 2, "tie_word_embeddings": False, "decoder_start_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        {
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", {}),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", {}),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", {}),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", {}),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", {}),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", {}),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", GROUPED),
}


def save_tiny_models(folder: Path) -> None:
    """Write every model below `folder`, and the adapter config that test_config.py reads."""
    for name, (class_name, options) in MODELS.items():
        torch.manual_seed(0)
        model_class = getattr(transformers, class_name)
        model = model_class(model_class.config_class(**SIZES, **options))
        for weight in model.parameters():
            if weight.dim() > 1:  # large weights, so that a small delta changes what the model generates
                torch.nn.init.normal_(weight, std=0.1)
        model.save_pretrained(folder / name)
    LoraConfig().save_pretrained(folder / "peft-internal-testing/tiny-opt-lora-revision")
