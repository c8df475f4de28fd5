"""Makes what both sides of the benchmark run on: random networks as diffusers folders, inputs, and what PyTorch makes of
them in float32.

    python make_cases.py --out DIR

Each case is a folder DIR/{dit,t5,vae} with `model/`, a checkpoint, and `tensors.safetensors`, inputs and expected output
under the names of tools/goldens. Folders of these names that are there already are replaced.
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from networks import NETWORKS  # and the way to tools/goldens
from make_goldens import Random

SEED = 20271
TEXT_TOKENS = 40


def make_dit(random, folder):
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
    random.fill(dit).save_pretrained(folder / "transformer")
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


def make(case, random, out):
    folder = out / case
    shutil.rmtree(folder, ignore_errors=True)
    tensors = {"dit": make_dit, "t5": make_t5, "vae": make_vae}[case](random, folder / "model")
    network = NETWORKS[case]
    tensors[network.output] = network.forward(network.load(folder / "model", torch.float32), tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "tensors.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    with torch.no_grad():
        for number, case in enumerate(NETWORKS):
            # A generator each: no case depends on another's size.
            make(case, Random(SEED + number), out)


if __name__ == "__main__":
    main()
