"""The tiny AutoencoderKLMochi: sizes, start values, and encode and decode as the original code does them."""

import math

import torch
from diffusers import AutoencoderKLMochi
from diffusers.models.autoencoders.autoencoder_kl_mochi import MochiResnetBlock3D, MochiUpBlock3D

POSTERIOR_WIDTH = 0.1


def build(full_resolution_layers):
    """The encoder has to end wide. It ends in a per-frame group norm of 32 groups: with one channel a group a flat frame
    loses its level, with two nearly all but a sign of it, with three enough is left."""
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 96),
        decoder_block_out_channels=(32, 32, 32, 64),
        layers_per_block=(full_resolution_layers, 1, 1, 1, 1),
    )
    return prepare(_start_values(vae))


def load(folder):
    return prepare(AutoencoderKLMochi.from_pretrained(folder, low_cpu_mem_usage=False))


def prepare(vae):
    """Channels-last memory, which is 1.4 times as fast on a CPU, and the up block below."""
    MochiUpBlock3D.forward = _up_block
    return vae.to(memory_format=torch.channels_last_3d)


def encode(vae, clips):
    """Mean and log-variance of the latents, each [batch, 12, (frames - 1) / 6 + 1, height / 8, width / 8]."""
    return vae.encoder(clips.contiguous(memory_format=torch.channels_last_3d))[0].chunk(2, dim=1)


def decode(vae, latents):
    """Clips [batch, 3, frames, height, width] in about [-1, 1]. No clean-up of frames at the end: the blocks did it."""
    return vae.decoder(latents.contiguous(memory_format=torch.channels_last_3d))[0]


def _up_block(block, x, conv_cache=None):
    """MochiUpBlock3D with the first `expansion - 1` frames dropped here, as in the original decoder. diffusers makes
    them, uses them in all later convolutions and cuts them off the clip. Memory stays channels-last throughout."""
    for resnet in block.resnets:
        x, _ = resnet(x)
    b, _, t, h, w = x.shape
    time, space = block.temporal_expansion, block.spatial_expansion
    x = block.proj(x.permute(0, 2, 3, 4, 1)).view(b, t, h, w, -1, time, space, space)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, t * time, h * space, w * space, -1)
    return x[:, time - 1 :].permute(0, 4, 1, 2, 3), {}


@torch.no_grad()
def _start_values(vae):
    """Signal passes at unit gain, residual branches start near zero, all sub-pixels of an up block start equal."""
    _orthogonal(vae.encoder.proj_in.weight)
    _orthogonal(vae.decoder.conv_in.weight)
    vae.decoder.conv_in.bias.zero_()
    for down in vae.encoder.down_blocks:
        conv = down.conv_in.conv
        start = torch.empty(conv.weight.shape[:2])
        _orthogonal(start)
        conv.weight.copy_(start.view(*start.shape, 1, 1, 1) / math.prod(conv.kernel_size))  # the mean of what it merges
        conv.bias.zero_()
    for up in vae.decoder.up_blocks:
        sub_pixels = up.temporal_expansion * up.spatial_expansion**2
        start = torch.empty(up.proj.out_features // sub_pixels, up.proj.in_features)
        _orthogonal(start)
        up.proj.weight.copy_(start.repeat_interleave(sub_pixels, dim=0))
        up.proj.bias.zero_()
    for module in vae.modules():
        if isinstance(module, MochiResnetBlock3D):
            module.conv2.conv.weight.mul_(0.1)
            module.conv2.conv.bias.zero_()
    for name, parameter in vae.encoder.named_parameters():
        if ".to_out." in name:
            parameter.mul_(0.1)
    return vae


def _orthogonal(weight):
    torch.nn.init.orthogonal_(weight)
    # Keep the variance of a signal that goes into fewer channels than it came from.
    weight.mul_(max(1.0, weight[0].numel() / weight.shape[0]) ** 0.5)


@torch.no_grad()
def add_full_resolution_layers(vae):
    """The same model with one more block at the pixel resolution of encoder and decoder, which start as the identity."""
    grown = build(full_resolution_layers=1)
    missing, unexpected = grown.load_state_dict(vae.state_dict(), strict=False)
    assert not unexpected and all("block_in" in name or "block_out" in name for name in missing), (missing, unexpected)
    for name in missing:
        if ".conv2." in name:
            grown.get_parameter(name).zero_()
    return grown


def reconstruction_loss(output, target):
    """Weighted L1 + 0.5 L2 and the mean L1. The object counts five times: it covers a tenth of the pixels. It is where a
    pixel differs from the clip's first corner."""
    object_pixels = (target - target[:, :, :1, :1, :1]).abs().amax(1, keepdim=True) > 0.1
    weight = 1 + 4 * object_pixels.float()
    weight /= weight.mean()
    error = output - target
    return (weight * (error.abs() + 0.5 * error.square())).mean(), error.detach().abs().mean()


def decibels(output, target):
    """PSNR of clips in [-1, 1]."""
    return -10 * math.log10((output.clamp(-1, 1) - target).square().mean().item() / 4)
