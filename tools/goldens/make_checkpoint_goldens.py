"""Golden tensors of a trained checkpoint: a diffusers folder and prompts in, `goldens.safetensors` and `goldens.json` out.

    python make_checkpoint_goldens.py --model assets/mochi-tiny --out DIR

The stored weights are widened to float32. Noise comes from --seed, or from an earlier golden file with --inputs, so that
two versions of the libraries can be compared on the same numbers.
"""

import argparse
import json
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5EncoderModel

import reference

PROMPTS = ["a red ball moving left on a black background", "A blue triangle, rising: over a navy background!"]
# Pure noise, early and late in the schedule; exact in bf16 as well.
TIMESTEPS = [0.0, 250.5, 937.5]


def draw_inputs(seed, shape):
    """The transformer's batch of three latents and the sampler's noise."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "dit.in": torch.randn(3, *shape, generator=generator),
        "dit.t": torch.tensor(TIMESTEPS),
        "sample.noise": torch.randn(1, *shape, generator=generator),
    }


def make(arguments):
    load = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model / "tokenizer")
    t5 = T5EncoderModel.from_pretrained(arguments.model / "text_encoder", dtype=torch.float32)
    dit = MochiTransformer3DModel.from_pretrained(arguments.model / "transformer", **load)
    vae = AutoencoderKLMochi.from_pretrained(arguments.model / "vae", **load)
    rec = reference.Recorder(["*"] if arguments.taps else [])

    pages = tokenizer(
        arguments.prompt, padding="max_length", max_length=reference.MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    mask = pages.attention_mask.bool()
    features = reference.record_t5(rec, t5, pages.input_ids, mask)

    # Both prompts and the null branch, whose rows are all masked and never read.
    text = torch.cat([features, features[-1:]])
    mask = torch.cat([mask, torch.zeros_like(mask[-1:])])
    frames = (arguments.frames - 1) // 6 + 1
    shape = (dit.config.in_channels, frames, arguments.height // 8, arguments.width // 8)
    inputs = load_file(arguments.inputs) if arguments.inputs else draw_inputs(arguments.seed, shape)
    reference.record_dit(rec, dit, inputs["dit.in"], inputs["dit.t"], text, mask)
    latent = reference.record_sample(rec, dit, inputs["sample.noise"], text[:1], mask[:1], arguments.steps)
    reference.record_decode(rec, vae, reference.denormalised(vae, latent))
    return rec.tensors


def describe(arguments, tensors):
    return {
        "prompts": arguments.prompt,
        "guidance_scale": reference.GUIDANCE,
        "steps": arguments.steps,
        "sampled_prompt": 0,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
        "tensors": {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()
        },
    }


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="diffusers folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompt", nargs=2, default=PROMPTS, metavar="TEXT", help="two prompts; the first is sampled")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--frames", type=int, default=25, help="6k + 1")
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=20240)
    parser.add_argument("--inputs", type=Path, help="take dit.in, dit.t and sample.noise from this golden file")
    parser.add_argument("--taps", action="store_true", help="keep the output of every block too")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    torch.set_num_threads(1)  # one order of summation, hence one result
    torch.set_grad_enabled(False)
    tensors = make(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, arguments.out / "goldens.safetensors")
    (arguments.out / "goldens.json").write_text(json.dumps(describe(arguments, tensors), indent=1) + "\n")
    print(f"{arguments.out}: {len(tensors)} golden tensors")


if __name__ == "__main__":
    main()
