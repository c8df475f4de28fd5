"""Renders captions with a checkpoint and checks colour, motion and background by looking at the pixels alone.

python evaluate.py MODEL --clips 48 --sheet sheet.png
python evaluate.py --truth                  the checker on clips that are right by construction
"""

import argparse
import random
from pathlib import Path

import torch
from diffusers import MochiTransformer3DModel
from PIL import Image
from transformers import AutoTokenizer, T5EncoderModel

import dit as tiny_dit
import tiny_data
import vae as tiny_vae

BATCH = 12


def nearest(colour, names):
    return min(names, key=lambda name: (colour - torch.tensor(names[name])).square().sum().item())


def look(clip):
    """Colour, motion and background of a clip, [3, frames, height, width] in [0, 1]. Colour and motion are None if there
    is nothing on the background."""
    edges = (clip[:, :, 0], clip[:, :, -1], clip[..., 0], clip[..., -1])
    border = torch.cat([edge.flatten(1) for edge in edges], 1)
    background = border.median(1).values
    contrast = (clip - background.view(3, 1, 1, 1)).abs().amax(0)  # [frames, height, width]
    seen = contrast > 0.25
    areas = seen.sum((1, 2)).float()
    found = {"colour": None, "motion": None, "background": nearest(background, tiny_data.BACKGROUNDS)}
    if areas.min() < 8:
        return found

    # The half of the object that differs most from the background: its edge is a mixture of both.
    inside = contrast >= contrast[seen].median()
    found["colour"] = nearest(clip[:, inside].mean(1), tiny_data.COLOURS)

    y, x = torch.meshgrid(torch.arange(clip.shape[2]), torch.arange(clip.shape[3]), indexing="ij")
    centres = torch.stack([(seen * axis).sum((1, 2)) / areas for axis in (x, y)], 1)
    quarter = max(1, len(areas) // 4)
    dx, dy = centres[-quarter:].mean(0) - centres[:quarter].mean(0)
    growth = areas[-quarter:].mean() / areas[:quarter].mean()
    if max(dx.abs(), dy.abs()) > 5:
        horizontal = dx.abs() > dy.abs()
        found["motion"] = ("right" if dx > 0 else "left") if horizontal else ("down" if dy > 0 else "up")
    else:
        found["motion"] = "growing" if growth > 1.5 else "still"
    return found


class Checkpoint:
    """The stored weights widened to float32."""

    def __init__(self, folder):
        self.vae = tiny_vae.load(folder / "vae").float()
        self.dit = MochiTransformer3DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False).float()
        tiny_dit.use_batched_attention(self.dit)
        self.text_encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    @torch.no_grad()
    def render(self, captions, frames, steps, guidance, generator):
        shape = ((frames - 1) // 6 + 1, 8, 8)
        latents = tiny_dit.sample(
            self.dit, self.text_encoder, self.tokenizer, captions, shape, steps, guidance, generator
        )
        mean, std = (torch.tensor(self.vae.config[f"latents_{name}"]).view(1, 12, 1, 1, 1) for name in ("mean", "std"))
        return (tiny_vae.decode(self.vae, latents * std + mean) / 2 + 0.5).clamp(0, 1)


def save_sheet(path, clips):
    """One row of eight frames for each clip."""
    rows = [
        torch.cat(list(clip[:, torch.linspace(0, clip.shape[1] - 1, 8).long()].unbind(1)), -1) for clip in clips[:24]
    ]
    pixels = (torch.cat(rows, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(path)


def report(scenes, clips):
    found = [look(clip) for clip in clips]
    share = {key: sum(f[key] == getattr(s, key) for f, s in zip(found, scenes)) / len(scenes) for key in found[0]}
    share["object seen"] = sum(f["colour"] is not None for f in found) / len(scenes)
    print(f"{len(scenes)} clips: " + ", ".join(f"{key} {100 * value:.1f} %" for key, value in share.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--truth", action="store_true")
    parser.add_argument("--clips", type=int, default=len(tiny_data.SCENES))
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="picture of the first 24 clips")
    arguments = parser.parse_args()
    if arguments.truth == bool(arguments.model):
        parser.error("give a model folder or --truth")
    rng = random.Random(arguments.seed)
    scenes = rng.sample(tiny_data.SCENES, min(arguments.clips, len(tiny_data.SCENES)))

    if arguments.truth:
        clips = [tiny_data.render(scene, arguments.frames, 64, 64, rng) / 2 + 0.5 for scene in scenes]
    else:
        model, generator = Checkpoint(arguments.model), torch.Generator().manual_seed(arguments.seed)
        clips = []
        for start in range(0, len(scenes), BATCH):
            captions = [tiny_data.plain_caption(scene) for scene in scenes[start : start + BATCH]]
            clips += model.render(captions, arguments.frames, arguments.steps, arguments.guidance, generator)
    report(scenes, clips)
    if arguments.sheet:
        save_sheet(arguments.sheet, clips)


if __name__ == "__main__":
    main()
