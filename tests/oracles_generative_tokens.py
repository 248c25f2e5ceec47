"""Quantisation, patches, the image autoencoder and drawing of tokens, slow and obvious."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gpseq.generative.token_prior import TokenPrior
from gpseq.generative.video_vq import VideoVQ

SHAPE = (1, 8, 8)


def tiny_vq(dtype: torch.dtype = torch.float64, **options: object) -> VideoVQ:
    """A small autoencoder of 8x8 images, its codebook apart enough for distinct tokens."""
    sizes = {"num_frames": 4, "dim": 8, "num_heads": 2, "num_codes": 16, "code_dim": 4, "spatial_depth": 1}
    return VideoVQ(SHAPE, dtype=dtype, **{**sizes, "temporal_depth": 1, **options})  # type: ignore[arg-type]


def tiny_prior(dtype: torch.dtype = torch.float64, **options: object) -> TokenPrior:
    """A small prior whose head is no longer zero."""
    sizes = {"num_codes": 5, "token_shape": (2, 3), "dim": 8, "num_heads": 2, "depth": 2}
    prior = TokenPrior(dtype=dtype, **{**sizes, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        for value in prior.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return prior


def videos(batch: int = 3, frames: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random videos of 8x8 images."""
    return torch.rand(batch, frames, *SHAPE, dtype=dtype)


def patches_by_hand(frame: Tensor, h: int, w: int) -> Tensor:
    """The patches of one frame ``(C, H, W)``, row by row."""
    rows, columns = frame.shape[1] // h, frame.shape[2] // w
    cut = [frame[:, i * h : (i + 1) * h, j * w : (j + 1) * w] for i in range(rows) for j in range(columns)]
    return torch.stack([part.reshape(-1) for part in cut])


def nearest_by_hand(z: Tensor, codes: Tensor) -> Tensor:
    """Nearest codes by all distances."""
    return (z.unsqueeze(-2) - codes).square().sum(-1).argmin(-1)


def averages_by_hand(codes: Tensor, counts: Tensor, z: Tensor, tokens: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Codes as moving sums over moving counts."""
    sums = codes * counts.unsqueeze(-1)
    new_codes, new_counts = codes.clone(), counts.clone()
    for k in range(len(codes)):
        mine = z[tokens == k]
        new_counts[k] = decay * counts[k] + (1 - decay) * len(mine)
        new_codes[k] = (decay * sums[k] + (1 - decay) * mine.sum(0)) / new_counts[k]
    return new_codes, new_counts


def image_autoencoder(model: VideoVQ, images: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and reconstructions of images ``(B, C, H, W)`` without an axis of time.

    Attention of a single time to itself is the product of two matrices, at each site alone.
    """
    h, w = model.patch_size

    def alone(layers, x):
        for layer in layers:
            n = layer.norm1(x)
            value = layer.self_attn.in_proj_weight.chunk(3)[2], layer.self_attn.in_proj_bias.chunk(3)[2]
            x = x + layer.self_attn.out_proj(functional.linear(n, *value))
            x = x + layer.linear2(functional.gelu(layer.linear1(layer.norm2(x))))
        return x

    x = model.embed(torch.stack([patches_by_hand(image, h, w) for image in images])) + model.encoder_places[0]
    for layer in model.encoder_space:
        x = layer(x)
    tokens = nearest_by_hand(model.encoder_head(alone(model.encoder_time, x)), model.quantiser.codes)
    x = alone(model.decoder_time, model.decoder_stem(model.quantiser.codes[tokens]) + model.decoder_places[0])
    for layer in model.decoder_space:
        x = layer(x)
    patches = model.head(model.decoder_norm(x))
    decoded = torch.zeros_like(images)
    for site in range(patches.shape[1]):
        i, j = divmod(site, images.shape[-1] // w)
        part = patches[:, site].view(len(images), images.shape[1], h, w)
        decoded[:, :, i * h : (i + 1) * h, j * w : (j + 1) * w] = part
    return tokens, decoded


@torch.no_grad()
def sample_by_hand(prior: TokenPrior, n: int, temperature: float, seed: int) -> Tensor:
    """Tokens by one pass over all of them for each."""
    length = prior.token_shape[0] * prior.token_shape[1]
    uniform = torch.rand(length, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    tokens = torch.zeros(n, length, dtype=torch.int64)
    for place in range(length):
        logits = prior.logits(tokens.view(n, *prior.token_shape)).flatten(1, 2)[:, place]
        cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
        for row in range(n):
            tokens[row, place] = int((cumulative[row] <= uniform[place, row]).sum())
    return tokens.view(n, *prior.token_shape)
