"""Makes what both sides of the benchmark run on: random networks as diffusers folders, inputs, and what PyTorch makes of
them in float32.

    python make_cases.py --out DIR

Each case is a folder DIR/{dit,dit-bf16,t5,vae} with `model/`, a checkpoint, and `tensors.safetensors`, inputs and expected
output under the names of tools/goldens. Weights of `dit-bf16` are those of `dit`, rounded and stored in bf16; what is expected of
them is computed in float32 too. Folders of these names that are there already are replaced.
"""

import argparse
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import torch
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from networks import NETWORKS  # and the way to tools/goldens
from make_goldens import Random

SEED = 20271
TEXT_TOKENS = 40


def make_dit(random, folder, dtype=torch.float32):
    """848x480, 19 frames: 4 x 30 x 53 = 6360 tokens."""
    dit = MochiTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=128,
        num_layers=6,
        pooled_projection_dim=384,
        in_channels=12,
        text_embed_dim=512,
        time_embed_dim=256,
    )
    random.fill(dit).to(dtype).save_pretrained(folder / "transformer")
    return {
        "dit.in": random.normal(1, 12, 4, 60, 106),
        "dit.t": torch.tensor([250.0]),
        "dit.text": random.normal(1, TEXT_TOKENS, 512),
    }


def make_t5(random, folder):
    config = T5Config(
        vocab_size=32128,
        d_model=1024,
        d_kv=64,
        num_heads=16,
        d_ff=2816,
        num_layers=12,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    # Its own initialisation: attention has no scale, so weights of any other size make every softmax a choice of one.
    torch.manual_seed(SEED)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return {"t5.ids": torch.randint(2, config.vocab_size, (1, TEXT_TOKENS), generator=random.generator)}


def make_vae(random, folder):
    """192x256, 25 frames."""
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 64, 64, 96),
        layers_per_block=(3, 3, 4, 6, 3),
    )
    random.fill(vae).save_pretrained(folder / "vae")
    return {"vae.in": random.normal(1, 12, 5, 24, 32)}


@dataclass(frozen=True)
class Case:
    network: str
    # (random, folder) -> inputs; writes the checkpoint
    make: Callable
    # A case does not depend on the size of another.
    seed: int


CASES = {
    "dit": Case("dit", make_dit, SEED),
    "dit-bf16": Case("dit", partial(make_dit, dtype=torch.bfloat16), SEED),
    "t5": Case("t5", make_t5, SEED + 1),
    "vae": Case("vae", make_vae, SEED + 2),
}


def make(name, case, out):
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    tensors, network = case.make(Random(case.seed), folder / "model"), NETWORKS[case.network]
    tensors[network.output] = network.forward(network.load(folder / "model", torch.float32), tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "tensors.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    with torch.no_grad():
        for name, case in CASES.items():
            make(name, case, out)


if __name__ == "__main__":
    main()
