"""The original checkpoint layout (`dit.safetensors`, `decoder.safetensors`) of diffusers' modules."""

import torch


def swap_halves(tensor):
    """The original SwiGLU applies silu to the first half and has (shift, scale); diffusers has both the other way."""
    return torch.cat(tensor.chunk(2, 0)[::-1], 0)


def original_dit(dit):
    """State dict of a MochiTransformer3DModel under its original names."""
    source, target = dit.state_dict(), {}

    def copy(to, name, change=lambda tensor: tensor):
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in source:
                target[f"{to}.{kind}"] = change(source[f"{name}.{kind}"])

    def stack(to, names):
        target[f"{to}.weight"] = torch.cat([source[f"{name}.weight"] for name in names])

    target["pos_frequencies"] = source["pos_frequencies"]
    copy("x_embedder.proj", "patch_embed.proj")
    copy("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1")
    copy("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2")
    copy("t5_yproj", "time_embed.caption_proj")
    for part in ("to_kv", "to_q", "to_out"):
        copy(f"t5_y_embedder.{part}", f"time_embed.pooler.{part}")

    for i in range(dit.config.num_layers):
        to, name = f"blocks.{i}", f"transformer_blocks.{i}"
        last = i == dit.config.num_layers - 1
        copy(f"{to}.mod_x", f"{name}.norm1.linear")
        # The last block does not update the text: its modulation is the scale alone, and it has no text MLP.
        copy(f"{to}.mod_y", f"{name}.norm1_context.linear_1" if last else f"{name}.norm1_context.linear")
        stack(f"{to}.attn.qkv_x", [f"{name}.attn1.to_{part}" for part in "qkv"])
        stack(f"{to}.attn.qkv_y", [f"{name}.attn1.add_{part}_proj" for part in "qkv"])
        copy(f"{to}.attn.q_norm_x", f"{name}.attn1.norm_q")
        copy(f"{to}.attn.k_norm_x", f"{name}.attn1.norm_k")
        copy(f"{to}.attn.q_norm_y", f"{name}.attn1.norm_added_q")
        copy(f"{to}.attn.k_norm_y", f"{name}.attn1.norm_added_k")
        copy(f"{to}.attn.proj_x", f"{name}.attn1.to_out.0")
        copy(f"{to}.attn.proj_y", f"{name}.attn1.to_add_out")
        for mlp, ff in (("mlp_x", "ff"), ("mlp_y", "ff_context")):
            copy(f"{to}.{mlp}.w1", f"{name}.{ff}.net.0.proj", swap_halves)
            copy(f"{to}.{mlp}.w2", f"{name}.{ff}.net.2")

    copy("final_layer.mod", "norm_out.linear", swap_halves)
    copy("final_layer.linear", "proj_out")
    return target


def original_decoder(vae):
    """State dict of an AutoencoderKLMochi's decoder under its original names."""
    source, target = vae.decoder.state_dict(), {}

    def copy(to, name):
        for kind in ("weight", "bias"):
            target[f"{to}.{kind}"] = source[f"{name}.{kind}"]

    def copy_resnet(to, name):
        for index, part in ((0, "norm1.norm_layer"), (2, "conv1.conv"), (3, "norm2.norm_layer"), (5, "conv2.conv")):
            copy(f"{to}.stack.{index}", f"{name}.{part}")

    # Blocks per stage, from the latent to the pixels; the config lists them from the pixels to the latent.
    first, *ups, last = reversed(vae.config.layers_per_block)
    copy("blocks.0.0", "conv_in")
    for i in range(first):
        copy_resnet(f"blocks.0.{i + 1}", f"block_in.resnets.{i}")
    for stage, layers in enumerate(ups):
        for i in range(layers):
            copy_resnet(f"blocks.{stage + 1}.blocks.{i}", f"up_blocks.{stage}.resnets.{i}")
        copy(f"blocks.{stage + 1}.proj", f"up_blocks.{stage}.proj")
    for i in range(last):
        copy_resnet(f"blocks.{len(ups) + 1}.{i}", f"block_out.resnets.{i}")
    copy("output_proj", "proj_out")
    return target
