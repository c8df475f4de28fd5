"""Latents of procedural clips, normalised per channel; writes the mean and deviation into the VAE's config.

python encode_data.py VAE OUT.safetensors --clips 2328
"""

import argparse
import random

import torch
from safetensors.torch import save_file

import tiny_data
import vae as tiny_vae

FRAMES = (13, 19, 25)
# Width and height, with their share of the clips.
SIZES = {(64, 64): 0.7, (64, 96): 0.15, (96, 64): 0.15}


def plan(count, rng):
    """Every scene equally often, without the held-out ones; each with a size and a length."""
    scenes = [index for index, scene in enumerate(tiny_data.SCENES) if not tiny_data.is_held_out(scene)]
    rng.shuffle(scenes)
    for i in range(count):
        (width, height), frames = rng.choices(list(SIZES), SIZES.values())[0], rng.choice(FRAMES)
        yield scenes[i % len(scenes)], frames, height, width


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vae", help="folder; its config.json gets latents_mean and latents_std")
    parser.add_argument("out")
    parser.add_argument("--clips", type=int, default=2328)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)

    vae = tiny_vae.load(arguments.vae)
    buckets = {}  # shape of the latent -> [(latent, index of the scene)]
    with torch.no_grad():
        for index, frames, height, width in plan(arguments.clips, rng):
            clip = tiny_data.render(tiny_data.SCENES[index], frames, height, width, rng)
            latent = tiny_vae.encode(vae, tiny_data.dither(clip[None]))[0][0]
            buckets.setdefault("x".join(map(str, latent.shape[1:])), []).append((latent, index))

    everything = torch.cat([latent.flatten(1) for pairs in buckets.values() for latent, _ in pairs], dim=1)
    mean, std = everything.mean(1), everything.std(1)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.save_config(arguments.vae)

    tensors = {}
    for shape, pairs in buckets.items():
        latents = torch.stack([latent for latent, _ in pairs])
        tensors[f"latents.{shape}"] = (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
        tensors[f"scenes.{shape}"] = torch.tensor([index for _, index in pairs])
    save_file(tensors, arguments.out)
    counts = ", ".join(f"{len(pairs)} of {shape}" for shape, pairs in buckets.items())
    print(f"{arguments.out}: {arguments.clips} latents: {counts}")


if __name__ == "__main__":
    main()
