"""The bundled checkpoint's clip with diffusers, as a user's script would make it: pipeline from the folder, call, mp4. Prints
one JSON object. The time is taken by whoever starts this program.

    python clip.py --model assets/mochi-tiny --out clip.mp4 --threads 1
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import MochiPipeline
from diffusers.utils import export_to_video

import memory
import versions

FRAMES_PER_SECOND = 30


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="diffusers folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompt", default="a red ball moving left on a black background")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    defaults = json.loads((arguments.model / "generation_config.json").read_text())
    # Stored in bf16, computed in f32: as on the other side.
    pipeline = MochiPipeline.from_pretrained(arguments.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    frames = pipeline(arguments.prompt, generator=generator, **defaults).frames[0]
    export_to_video(frames, str(arguments.out), fps=FRAMES_PER_SECOND)
    printed = {"peak_mib": memory.peak_mib(), "cuda_mib": memory.cuda_mib(), "versions": versions.here()}
    print(json.dumps(printed))


if __name__ == "__main__":
    main()
