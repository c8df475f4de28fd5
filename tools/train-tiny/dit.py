"""The tiny text encoder and MochiTransformer3DModel: sizes, start values, one attention call a batch, and sampling."""

import math

import torch
import torch.nn.functional as F
from diffusers import MochiTransformer3DModel
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from transformers import T5Config, T5EncoderModel

TEXT_WIDTH = 64
MAX_TOKENS = 32  # of the captions in training; padding takes no part, so any length renders the same


def build_text_encoder(vocabulary):
    config = T5Config(
        vocab_size=32 * math.ceil(vocabulary / 32),
        d_model=TEXT_WIDTH,
        d_kv=16,
        num_heads=4,
        d_ff=128,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def build(layers=3, heads=12, head_dim=16, constant_part=0.6):
    dit = MochiTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        pooled_projection_dim=48,
        in_channels=12,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=256,
        max_sequence_length=256,
    )
    with torch.no_grad():
        # A constant part in every visual token. Mochi has no position signal but the rotations of attention: without
        # something constant to rotate, a token can hardly tell where it is, and motion is not learned.
        dit.patch_embed.proj.bias.normal_(std=constant_part)
        # Radians a frame, and radians a step of the 192 x 192 grid that rows and columns are scaled to: neighbouring
        # patches of a 64 x 64 clip lie 48 apart.
        scale = torch.tensor([0.6, 0.015, 0.015]).view(3, 1, 1)
        dit.pos_frequencies.copy_(scale * torch.randn_like(dit.pos_frequencies))
    return use_batched_attention(dit)


def use_batched_attention(dit):
    for block in dit.transformer_blocks:
        block.attn1.processor = BatchedAttention()
    return dit


class BatchedAttention:
    """MochiAttnProcessor2_0 as one masked call instead of a loop over the samples, equal in all rows that are read."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb):
        def split(x):  # [batch, tokens, heads, head_dim]
            return x.unflatten(2, (attn.heads, -1))

        query = _rotate(attn.norm_q(split(attn.to_q(hidden_states))), *image_rotary_emb)
        key = _rotate(attn.norm_k(split(attn.to_k(hidden_states))), *image_rotary_emb)
        text_query = attn.norm_added_q(split(attn.add_q_proj(encoder_hidden_states)))
        text_key = attn.norm_added_k(split(attn.add_k_proj(encoder_hidden_states)))
        query, key = torch.cat([query, text_query], 1), torch.cat([key, text_key], 1)
        value = split(torch.cat([attn.to_v(hidden_states), attn.add_v_proj(encoder_hidden_states)], 1))

        visual = hidden_states.shape[1]
        visible = F.pad(attention_mask.bool(), (visual, 0), value=True)[:, None, None]  # [batch, 1, 1, keys]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible).transpose(1, 2).flatten(2)
        text = out[:, visual:]
        if hasattr(attn, "to_add_out"):  # the last block does not update the text
            text = attn.to_add_out(text)
        return attn.to_out[0](out[:, :visual]), text


def _rotate(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def tokenize(tokenizer, captions):
    """ids and mask, [batch, MAX_TOKENS]."""
    pages = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return pages.input_ids, pages.attention_mask


@torch.no_grad()
def sample(dit, text_encoder, tokenizer, captions, shape, steps, guidance, generator):
    """Latents [batch, 12, *shape] of the captions, with a null branch of zero valid tokens."""
    ids, mask = tokenize(tokenizer, captions)
    text = text_encoder(ids, attention_mask=mask).last_hidden_state.repeat(2, 1, 1)
    mask = torch.cat([torch.zeros_like(mask), mask])
    progress = [1 - sigma for sigma in linear_quadratic_schedule(steps, 0.025)] + [1.0]
    latent = torch.randn(len(captions), 12, *shape, generator=generator)
    for now, then in zip(progress, progress[1:]):
        t = torch.full((2 * len(captions),), 1000.0 * now)
        uncond, cond = dit(latent.repeat(2, 1, 1, 1, 1), text, t, mask, return_dict=False)[0].chunk(2)
        latent = latent + (then - now) * (uncond + guidance * (cond - uncond))
    return latent
