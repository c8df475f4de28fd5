"""Trains the text encoder and the transformer together by flow matching, with newly worded captions at every step.

python train_dit.py LATENTS.safetensors TOKENIZER OUT --minutes 35
"""

import argparse
import random
from pathlib import Path

import torch
from diffusers import MochiTransformer3DModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5EncoderModel

import dit as tiny_dit
import tiny_data
from training import Trainer

BATCH = 32
EMPTY_AS_END, EMPTY_AS_NOTHING = 0.06, 0.06  # shares of prompts replaced by "" as one end token, as no token at all


class Latents:
    def __init__(self, path):
        tensors = load_file(path)
        shapes = [name.removeprefix("latents.") for name in tensors if name.startswith("latents.")]
        self.buckets = [(tensors[f"latents.{shape}"], tensors[f"scenes.{shape}"]) for shape in shapes]

    def batch(self, rng):
        """BATCH latents of one shape and their scenes."""
        latents, scenes = rng.choices(self.buckets, [len(latents) for latents, _ in self.buckets])[0]
        rows = [rng.randrange(len(latents)) for _ in range(BATCH)]
        return latents[rows], [tiny_data.SCENES[scenes[row]] for row in rows]


def draw_times(count):
    """Progress from noise (0) to data (1). Sampling takes half of its steps under 0.025 and most of the rest early."""
    times = torch.sigmoid(-1 + 1.2 * torch.randn(count))
    choice = torch.rand(count)
    times = torch.where(choice < 0.15, torch.rand(count), times)
    return torch.where(choice > 0.92, 0.03 * torch.rand(count), times)


def step_loss(dit, text_encoder, tokenizer, latents, rng):
    data, scenes = latents.batch(rng)
    captions = [tiny_data.caption(scene, rng) for scene in scenes]
    draw = torch.rand(len(captions))
    captions = ["" if drop else text for drop, text in zip(draw < EMPTY_AS_END, captions)]
    ids, mask = tiny_dit.tokenize(tokenizer, captions)
    text = text_encoder(ids, attention_mask=mask).last_hidden_state
    nothing = (draw >= EMPTY_AS_END) & (draw < EMPTY_AS_END + EMPTY_AS_NOTHING)
    mask = mask * ~nothing[:, None]

    times, noise = draw_times(len(data)), torch.randn_like(data)
    t = times.view(-1, 1, 1, 1, 1)
    velocity = dit(noise + t * (data - noise), text, 1000 * times, mask, return_dict=False)[0]
    losses = (velocity - (data - noise)).square().mean((1, 2, 3, 4))
    early = losses.detach()[times < 0.2]
    # Early on, the caption alone says where things go: what is learned of motion shows there.
    return losses.mean(), {"early": early.mean()} if len(early) else {}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("latents")
    parser.add_argument("tokenizer")
    parser.add_argument("out", type=Path, help="gets text_encoder/ and transformer/")
    parser.add_argument("--start", type=Path, help="go on from this folder's weights")
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)

    tokenizer, latents = AutoTokenizer.from_pretrained(arguments.tokenizer), Latents(arguments.latents)
    if arguments.start:
        text_encoder = T5EncoderModel.from_pretrained(arguments.start / "text_encoder").train()
        dit = MochiTransformer3DModel.from_pretrained(arguments.start / "transformer", low_cpu_mem_usage=False)
        tiny_dit.use_batched_attention(dit)
    else:
        text_encoder, dit = tiny_dit.build_text_encoder(len(tokenizer)), tiny_dit.build()
    trainer = Trainer([*text_encoder.parameters(), *dit.parameters()], arguments.rate, arguments.minutes, ema=0.9985)
    trainer.run(lambda step: step_loss(dit, text_encoder, tokenizer, latents, rng), report_every=50)
    text_encoder.save_pretrained(arguments.out / "text_encoder")
    dit.save_pretrained(arguments.out / "transformer")


if __name__ == "__main__":
    main()
