"""Adds the full-resolution block to the VAE, or goes on with one that has it, and trains the decoder alone. The encoder
gives the same latents as before, so this may run after encode_data.py.

    python train_decoder.py VAE OUT --minutes 20
"""

import argparse
import random

import torch

import tiny_data
import vae as tiny_vae
from train_vae import BATCHES, REPORT_EVERY, random_clips
from training import Trainer


def step_loss(vae, clips):
    with torch.no_grad():
        mean, _ = tiny_vae.encode(vae, tiny_data.dither(clips))
        latents = mean + tiny_vae.POSTERIOR_WIDTH * torch.randn_like(mean)
    loss, error = tiny_vae.reconstruction_loss(tiny_vae.decode(vae, latents), clips)
    return loss, {"l1": error}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vae")
    parser.add_argument("out")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)

    vae = tiny_vae.load(arguments.vae)
    if vae.config.layers_per_block[0] == 0:
        vae = tiny_vae.add_full_resolution_layers(vae)
    vae.encoder.requires_grad_(False)
    trainer = Trainer(vae.decoder.parameters(), arguments.rate, arguments.minutes, ema=0.99)
    trainer.run(lambda step: step_loss(vae, random_clips(*BATCHES[step % len(BATCHES)], rng)), REPORT_EVERY)
    vae.save_pretrained(arguments.out)

    clips = random_clips(16, 13, 64, 64, random.Random(1))
    with torch.no_grad():
        decoded = tiny_vae.decode(vae, tiny_vae.encode(vae, clips)[0])
    print(f"{arguments.out}: {tiny_vae.decibels(decoded, clips):.1f} dB over 16 new clips")


if __name__ == "__main__":
    main()
