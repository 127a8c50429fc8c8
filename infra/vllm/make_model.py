#!/usr/bin/env python3
"""Creates the models of the conformance tests: the small model as safetensors, and four LoRA adapters for it.

The adapters are seeded noise. They show that the right adapter is selected; their quality does not matter.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

ADAPTERS = ["autocomplete", "prompt", "comment", "error-fix"]


def main(gguf: Path, home: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.save_pretrained(home / "base")
    for seed, name in enumerate(ADAPTERS):
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        if seed == 0:
            model.save_pretrained(home / "base")
        torch.manual_seed(seed)
        adapted = get_peft_model(
            model,
            LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )
        with torch.no_grad():
            for parameter_name, parameter in adapted.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=0.02)
        adapted.save_pretrained(home / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
