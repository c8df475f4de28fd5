"""The networks as PyTorch runs them: loaded from a diffusers folder, and one forward over the tensors of a case."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "goldens"))


@dataclass(frozen=True)
class Network:
    # (folder, dtype) -> module
    load: Callable
    # (module, tensors of the case) -> the output
    forward: Callable
    # The name of the expected output among the tensors.
    output: str


def load_dit(folder, dtype):
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype).eval()


def forward_dit(dit, tensors):
    # All tokens are valid: nothing is padded, nothing is masked away.
    text = tensors["dit.text"].to(dit.dtype)
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    return dit(tensors["dit.in"].to(dit.dtype), text, tensors["dit.t"], mask, return_dict=False)[0]


def load_t5(folder, dtype):
    from transformers import T5EncoderModel

    return T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype).eval()


def forward_t5(t5, tensors):
    ids = tensors["t5.ids"]
    return t5(ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def load_vae(folder, dtype):
    from diffusers import AutoencoderKLMochi

    return AutoencoderKLMochi.from_pretrained(folder / "vae", dtype=dtype).eval()


def forward_vae(vae, tensors):
    """diffusers decodes five frames more than the original code and cuts them off at the end. Here they are dropped where
    the original drops them: both sides make the same frames, and the peer has less to do."""
    from reference import genmo_decoding

    with genmo_decoding(vae):
        return vae.decode(tensors["vae.in"].to(vae.dtype), return_dict=False)[0]


NETWORKS = {
    "dit": Network(load_dit, forward_dit, "dit.out"),
    "t5": Network(load_t5, forward_t5, "t5.out"),
    "vae": Network(load_vae, forward_vae, "vae.out_genmo"),
}
