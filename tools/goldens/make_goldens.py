"""Random tiny Mochi models in both checkpoint layouts, and the tensors that diffusers and transformers compute with them.

    python make_goldens.py --out DIR                      the full set, 60 MB
    python make_goldens.py --out DIR --preset small       the set in tests/goldens
    python make_goldens.py --out DIR --seed 7 --heads 5 --layers 4 --latent 5 6 12    any other

See README.md for what lies where. A second run writes the same bytes.
"""

import argparse
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

import reference
from original_layout import original_decoder, original_dit

VOCABULARY = 128


@dataclass(frozen=True)
class Sizes:
    """Defaults are the full preset. No width, count or extent is a round one: six heads do not divide by four, 105
    tokens not by two, and every axis has its own length, so that mixed-up axes cannot go unnoticed."""

    heads: int = 6
    head_dim: int = 32
    layers: int = 3
    text_width: int = 96
    t5_width: int = 64  # divides by the pooling's fixed 8 heads
    t5_heads: int = 6
    t5_head_dim: int = 8  # 6 * 8 = 48 is not the width
    t5_ffn: int = 96
    t5_layers: int = 3
    latent: tuple[int, int, int] = (3, 10, 14)  # frames, height, width: 5 x 7 patches
    steps: int = 6
    vae_encoder: tuple[int, int, int, int] = (32, 32, 64, 64)  # multiples of GroupNorm's 32 groups
    vae_decoder: tuple[int, int, int, int] = (32, 64, 64, 96)  # from the pixels to the latent
    vae_layers: tuple[int, int, int, int, int] = (1, 2, 1, 2, 1)
    vae_latent: tuple[int, int, int] = (4, 6, 8)
    video: tuple[int, int, int] = (13, 16, 24)  # the encoder's input: frames, height, width

    def check(self):
        if any(extent % 2 for extent in self.latent[1:]):
            raise SystemExit(f"--latent {self.latent}: height and width must be even, patches are 2 x 2")
        if self.t5_width % 8 or self.head_dim % 2:
            raise SystemExit("--t5-width must divide by the 8 pooling heads, --head-dim by 2 (rotations)")
        if any(width % 32 for width in self.vae_encoder + self.vae_decoder):
            raise SystemExit("--vae-encoder and --vae-decoder need multiples of 32, the groups of GroupNorm")


@dataclass(frozen=True)
class Preset:
    sizes: Sizes
    taps: tuple[str, ...] = ("*",)
    # A small set leaves out what the product does not compute, stores the VAE's folder in bf16 and shards the others.
    small: bool = False


PRESETS = {
    "full": Preset(Sizes()),
    "small": Preset(
        Sizes(
            heads=3,
            head_dim=16,
            text_width=24,
            vae_encoder=(32, 32, 32, 32),
            vae_decoder=(32, 32, 64, 32),
            vae_layers=(1, 2, 1, 1, 1),
            vae_latent=(3, 2, 3),
        ),
        taps=("dit.*.[xy]", "dit.patch_embed", "dit.t_emb", "dit.pool", "dit.norm_out", "vae.*"),
        small=True,
    ),
}


class Random:
    """Every draw of a golden set, in order, from one generator."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def ids(self, *shape):
        # 0 and 1 are the pad and end tokens.
        return torch.randint(2, VOCABULARY, shape, generator=self.generator)

    def fill(self, module):
        """Draws every parameter. None may keep a default: a zero `pos_frequencies` or a unit norm weight never shows
        whether it is used at all."""
        for name, parameter in sorted(module.named_parameters()):
            draw = self.normal(*parameter.shape)
            if "pos_frequencies" in name:
                draw *= 0.2
            elif parameter.ndim == 1 and "norm" in name and name.endswith("weight") and "linear" not in name:
                draw = 1 + 0.3 * draw
            elif parameter.ndim == 1:
                draw *= 0.2
            else:
                draw *= 1.2 / math.sqrt(parameter[0].numel())
            parameter.copy_(draw)
        return module.eval()


def make_t5(sizes, random):
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=sizes.t5_width,
        d_kv=sizes.t5_head_dim,
        num_heads=sizes.t5_heads,
        d_ff=sizes.t5_ffn,
        num_layers=sizes.t5_layers,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    t5 = random.fill(T5EncoderModel(config))
    t5.shared.weight.copy_(random.normal(VOCABULARY, sizes.t5_width))
    table = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    table.copy_(random.normal(*table.shape))
    return t5


def make_dit(sizes, random):
    dit = MochiTransformer3DModel(
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        num_layers=sizes.layers,
        pooled_projection_dim=sizes.text_width,
        in_channels=12,
        text_embed_dim=sizes.t5_width,
        time_embed_dim=256,
        max_sequence_length=reference.MAX_TOKENS,
    )
    return random.fill(dit)


def make_vae(sizes, random):
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=sizes.vae_encoder,
        decoder_block_out_channels=sizes.vae_decoder,
        layers_per_block=sizes.vae_layers,
    )
    return random.fill(vae)


def rounded_to_bf16(module):
    for parameter in module.parameters():
        parameter.copy_(parameter.bfloat16().float())
    return module


def save_bf16(module, folder, **how):
    """Writes `module` in bf16 and leaves it in float32."""
    module.to(torch.bfloat16).save_pretrained(folder, **how)
    module.float()


def save_original(out, dit, vae):
    out.mkdir(parents=True, exist_ok=True)
    for name, tensors in (("dit", original_dit(dit)), ("decoder", original_decoder(vae))):
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, out / f"{name}.safetensors")


def text_batch(features):
    """Three samples of text: 17 tokens, 1 token, and none (the empty prompt)."""
    mask = torch.zeros(3, reference.MAX_TOKENS, dtype=torch.bool)
    mask[0, :17] = mask[1, :1] = True
    return features[[0, 1, 1]], mask


def make_set(out, preset, seed):
    """Writes the models and their goldens under `out`. Returns what the bf16 set needs."""
    sizes, random, rec = preset.sizes, Random(seed), reference.Recorder(preset.taps)
    t5, dit, vae = make_t5(sizes, random), make_dit(sizes, random), make_vae(sizes, random)
    if preset.small:
        # One golden for two ways of storing: bf16 values in the diffusers folder, the same values in float32 in the
        # original layout. The other parts keep values that bf16 cannot hold.
        save_bf16(rounded_to_bf16(vae), out / "vae")
        t5.save_pretrained(out / "text_encoder", max_shard_size="250KB")
        dit.save_pretrained(out / "transformer", max_shard_size="400KB")
    else:
        for name, module in (("text_encoder", t5), ("transformer", dit), ("vae", vae)):
            module.save_pretrained(out / name)
    save_original(out / "original", dit, vae)

    # Row 1 is long enough for every distance bucket of the position table.
    ids, mask = random.ids(2, reference.MAX_TOKENS), torch.zeros(2, reference.MAX_TOKENS, dtype=torch.bool)
    mask[0, :17] = mask[1, :200] = True
    ids[~mask] = 0
    text, text_mask = text_batch(reference.record_t5(rec, t5, ids, mask))

    latent, timesteps = random.normal(3, 12, *sizes.latent), torch.tensor([0.0, 123.4375, 871.25])
    reference.record_dit(rec, dit, latent, timesteps, text, text_mask)
    noise = random.normal(1, 12, *sizes.latent)
    reference.record_sample(rec, dit, noise, text[:1], text_mask[:1], sizes.steps)

    vae_latent = reference.denormalised(vae, random.normal(1, 12, *sizes.vae_latent))
    reference.record_decode(rec, vae, vae_latent, diffusers_output=not preset.small)
    if not preset.small:
        reference.record_tiled_decode(rec, vae, vae_latent)
        reference.record_encode(rec, vae, random.normal(1, 3, *sizes.video).clamp(-1, 1))
    save_goldens(out, rec)
    return dit, (latent, timesteps, text, text_mask), noise


def make_bf16_set(out, sizes, dit, inputs, noise):
    """The transformer stored the way the hub's bf16 variant is, with goldens of its widened values."""
    save_bf16(rounded_to_bf16(dit), out / "transformer", variant="bf16", max_shard_size="200KB")
    rec = reference.Recorder()
    reference.record_dit(rec, dit, *inputs)
    _, _, text, mask = inputs
    reference.record_sample(rec, dit, noise, text[:1], mask[:1], sizes.steps)
    save_goldens(out, rec)


def save_goldens(out, rec):
    save_file(rec.tensors, out / "goldens.safetensors")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {len(rec.tensors)} golden tensors, {size / 1e6:.1f} MB with the models")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=20240)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--no-taps", action="store_true", help="keep inputs and results only, nothing from inside")
    for field in fields(Sizes):
        name = "--" + field.name.replace("_", "-")
        if isinstance(field.default, tuple):
            parser.add_argument(name, type=int, nargs=len(field.default), metavar="N")
        else:
            parser.add_argument(name, type=int, metavar="N")
    arguments = parser.parse_args()

    preset = PRESETS[arguments.preset]
    given = {field.name: getattr(arguments, field.name) for field in fields(Sizes)}
    given = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None
    }
    preset = replace(preset, sizes=replace(preset.sizes, **given), taps=() if arguments.no_taps else preset.taps)
    preset.sizes.check()
    return arguments, preset


def main():
    arguments, preset = parse_arguments()
    torch.set_num_threads(1)  # one order of summation, hence one result
    torch.set_grad_enabled(False)
    if preset.small:
        dit, inputs, noise = make_set(arguments.out / "small", preset, arguments.seed)
        make_bf16_set(arguments.out / "small-bf16", preset.sizes, dit, inputs, noise)
    else:
        make_set(arguments.out, preset, arguments.seed)


if __name__ == "__main__":
    main()
