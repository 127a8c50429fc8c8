#!/usr/bin/env python3
"""Creates the models of the conformance tests: the small model as safetensors, four LoRA adapters for it, and a
model that reasons.

The adapters are seeded noise. They show that the right adapter is selected; their quality does not matter.
The model that reasons is the small model with a tokenizer that has the marks of reasoning. It never generates the
end mark, so everything that it generates is reasoning.
"""

import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

ADAPTERS = ["autocomplete", "prompt", "comment", "error-fix"]
# Special tokens that the model does not use, and the marks that replace them.
REASONING_MARKS = {"<gh_stars>": "<think>", "<issue_start>": "</think>"}


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
    save_reasoning_model(home / "base", home / "reasoning")


def save_reasoning_model(base: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in base.iterdir():
        if file.name == "tokenizer.json":
            text = file.read_text()
            for token, mark in REASONING_MARKS.items():
                text = text.replace(token, mark)
            (folder / file.name).write_text(text)
        else:
            (folder / file.name).symlink_to(Path("..") / base.name / file.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
