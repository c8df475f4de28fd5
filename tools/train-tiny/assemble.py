"""Puts the trained parts into one diffusers folder in bf16, with the generation defaults that the farm reads.

python assemble.py VAE DIT TOKENIZER OUT
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiTransformer3DModel
from transformers import T5EncoderModel

GENERATION = {"width": 64, "height": 64, "num_frames": 25, "num_inference_steps": 24, "guidance_scale": 4.5}
PIPELINE = {
    "_class_name": "MochiPipeline",
    "force_zeros_for_empty_prompt": False,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "MochiTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLMochi"],
}


def main(vae, dit, tokenizer, out):
    half = {"torch_dtype": torch.bfloat16, "low_cpu_mem_usage": False}
    AutoencoderKLMochi.from_pretrained(vae, **half).save_pretrained(out / "vae")
    MochiTransformer3DModel.from_pretrained(dit / "transformer", **half).save_pretrained(out / "transformer")
    T5EncoderModel.from_pretrained(dit / "text_encoder", dtype=torch.bfloat16).save_pretrained(out / "text_encoder")
    FlowMatchEulerDiscreteScheduler(invert_sigmas=True).save_pretrained(out / "scheduler")
    shutil.copytree(tokenizer, out / "tokenizer", dirs_exist_ok=True)
    for name, content in (("model_index.json", PIPELINE), ("generation_config.json", GENERATION)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
