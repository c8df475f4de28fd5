"""Runs diffusers' and transformers' Mochi modules and keeps what they compute, under the names that
`farm-node model parity` knows. Everything is float32 on the CPU; tensors are [batch, channels, frames, height, width].
"""

import fnmatch
from contextlib import contextmanager

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders import autoencoder_kl_mochi
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

MAX_TOKENS = 256
GUIDANCE = 4.5
THRESHOLD_NOISE = 0.025


class Recorder:
    """The golden tensors. `taps` are glob patterns of the intermediate tensors to keep; inputs and results always stay."""

    def __init__(self, taps=()):
        self.tensors = {}
        self.taps = tuple(taps)

    def put(self, name, tensor):
        self.tensors[name] = tensor.detach().contiguous().clone()

    @contextmanager
    def watch(self, modules):
        """Keeps the outputs of `modules`, pairs of (name, module) or (name, module, index into a tuple output)."""
        hooks = []
        for name, module, *index in modules:
            if any(fnmatch.fnmatch(name, pattern) for pattern in self.taps):
                index = index[0] if index else 0
                hooks.append(module.register_forward_hook(self._hook(name, index)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name, index):
        def keep(_module, _inputs, output):
            self.put(name, output[index] if isinstance(output, tuple) else output)

        return keep


@contextmanager
def genmo_decoding(vae):
    """Decodes as the original code does. It drops the first `expansion - 1` frames inside every up block; diffusers
    drops none there and cuts the finished video, so that its later causal convolutions see frames that should not be.
    """
    block = autoencoder_kl_mochi.MochiUpBlock3D
    original, cut_at_end = block.forward, vae.drop_last_temporal_frames

    def forward(self, hidden_states, conv_cache=None):
        hidden_states, new_cache = original(self, hidden_states, conv_cache)
        return hidden_states[:, :, self.temporal_expansion - 1 :], new_cache

    block.forward, vae.drop_last_temporal_frames = forward, False
    try:
        yield
    finally:
        block.forward, vae.drop_last_temporal_frames = original, cut_at_end


def record_t5(rec, t5, ids, mask):
    """ids [batch, 256] int64, mask [batch, 256] bool. Returns the features [batch, 256, width]."""
    rec.put("t5.ids", ids)
    rec.put("t5.mask", mask.to(torch.uint8))
    with rec.watch((f"t5.block{i}", block) for i, block in enumerate(t5.encoder.block)):
        features = t5(ids, attention_mask=mask).last_hidden_state
    rec.put("t5.out", features)
    return features


def record_dit(rec, dit, latent, timesteps, text, mask):
    """One forward pass. timesteps = 1000 (1 - sigma); text [batch, 256, width] with its mask [batch, 256] bool."""
    for name, tensor in (("in", latent), ("t", timesteps), ("text", text), ("mask", mask.to(torch.uint8))):
        rec.put(f"dit.{name}", tensor)
    frames, height, width = latent.shape[2], latent.shape[3] // 2, latent.shape[4] // 2
    cos, sin = dit.rope(dit.pos_frequencies, frames, height, width, device="cpu", dtype=torch.float32)
    rec.put("rope.cos", cos)
    rec.put("rope.sin", sin)
    modules = [
        ("dit.patch_embed", dit.patch_embed),
        ("dit.t_emb", dit.time_embed.timestep_embedder),
        ("dit.pool", dit.time_embed.pooler),
        ("dit.norm_out", dit.norm_out),
    ]
    for i, block in enumerate(dit.transformer_blocks):
        modules += [(f"dit.block{i}.attn_x", block.attn1), (f"dit.block{i}.x", block), (f"dit.block{i}.y", block, 1)]
    with rec.watch(modules):
        rec.put("dit.out", dit(latent, text, timesteps, mask, return_dict=False)[0])


def record_sample(rec, dit, noise, text, mask, steps):
    """Guided sampling of one prompt (text [1, 256, width], mask [1, 256]) against a null branch of zero valid tokens.
    Returns the final latent."""
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(sigmas=linear_quadratic_schedule(steps, THRESHOLD_NOISE))
    rec.put("sched.timesteps", scheduler.timesteps)
    rec.put("sched.sigmas", scheduler.sigmas)
    rec.put("sample.noise", noise)
    # The masked rows of the null branch are never read, so the prompt's own rows can stand there.
    text, mask = torch.cat([text, text]), torch.cat([torch.zeros_like(mask), mask])
    latent = noise
    for i, t in enumerate(scheduler.timesteps):
        velocity = dit(torch.cat([latent, latent]), text, t.expand(2), mask, return_dict=False)[0].float()
        uncond, cond = velocity.chunk(2)
        latent = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, latent, return_dict=False)[0]
        rec.put(f"sample.z{i}", latent)
    return latent


def denormalised(vae, latent):
    """The VAE's own latent values, from those of the transformer."""
    shape = (1, latent.shape[1], 1, 1, 1)
    mean, std = (torch.tensor(values).view(shape) for values in (vae.config.latents_mean, vae.config.latents_std))
    return latent * std + mean


def record_decode(rec, vae, latent, diffusers_output=True):
    """`vae.out_genmo` is the reference. `vae.out_diffusers` differs from it in the first frames, see `genmo_decoding`."""
    rec.put("vae.in", latent)
    if diffusers_output:
        rec.put("vae.out_diffusers", vae.decode(latent, return_dict=False)[0])
    blocks = [("vae.block_in", vae.decoder.block_in)]
    blocks += [(f"vae.up{i}", block) for i, block in enumerate(vae.decoder.up_blocks)]
    with genmo_decoding(vae), rec.watch(blocks):
        rec.put("vae.out_genmo", vae.decode(latent, return_dict=False)[0])


def record_tiled_decode(rec, vae, latent):
    """diffusers' tiles of 32 pixels at a stride of 24."""
    vae.enable_tiling(32, 32, 24, 24)
    rec.put("vae.out_diffusers_tiled", vae.decode(latent, return_dict=False)[0])
    vae.disable_tiling()


def record_encode(rec, vae, video):
    posterior = vae.encode(video).latent_dist
    for name, tensor in (("in", video), ("mean", posterior.mean), ("logvar", posterior.logvar)):
        rec.put(f"enc.{name}", tensor)
