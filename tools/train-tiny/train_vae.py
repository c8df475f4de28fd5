"""Trains the VAE without its full-resolution blocks, which cost most of the time and bring nothing early on.

python train_vae.py OUT --minutes 12
"""

import argparse
import random

import torch

import tiny_data
import vae as tiny_vae
from training import Trainer

# (clips, frames, height, width): short clips teach appearance, long ones time, wide ones other statistics in the norms.
BATCHES = [(4, 7, 64, 64), (4, 7, 64, 64), (2, 13, 64, 64), (1, 25, 64, 64), (1, 13, 64, 96), (1, 13, 96, 64)]
REPORT_EVERY = 4 * len(BATCHES)  # whole rounds, so that the means compare


def random_clips(count, frames, height, width, rng):
    clips = [tiny_data.render(rng.choice(tiny_data.SCENES), frames, height, width, rng) for _ in range(count)]
    return torch.stack(clips)


def step_loss(vae, clips):
    mean, log_variance = tiny_vae.encode(vae, tiny_data.dither(clips))
    width = tiny_vae.POSTERIOR_WIDTH
    # The width of the posterior is given, not learned: learned, it starts at 1 and drowns the signal for long.
    decoded = tiny_vae.decode(vae, mean + width * torch.randn_like(mean))
    loss, error = tiny_vae.reconstruction_loss(decoded, clips)
    prior = 0.5 * mean.square().mean() + (log_variance - 2 * torch.tensor(width).log()).square().mean()
    return loss + 1e-3 * prior, {"l1": error}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)

    vae = tiny_vae.build(full_resolution_layers=0)
    trainer = Trainer(vae.parameters(), arguments.rate, arguments.minutes, ema=0.99)
    trainer.run(lambda step: step_loss(vae, random_clips(*BATCHES[step % len(BATCHES)], rng)), REPORT_EVERY)
    vae.save_pretrained(arguments.out)

    clips = random_clips(16, 13, 64, 64, random.Random(1))
    with torch.no_grad():
        decoded = tiny_vae.decode(vae, tiny_vae.encode(vae, tiny_data.dither(clips))[0])
    print(f"{arguments.out}: {tiny_vae.decibels(decoded, clips):.1f} dB over 16 new clips")


if __name__ == "__main__":
    main()
