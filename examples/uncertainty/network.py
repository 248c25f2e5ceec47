"""A small vision transformer of ordinary torch layers, and how it is trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gpseq import training

PATCH, WIDTH, HEADS, DEPTH, BATCH = 7, 64, 4, 4, 100


class SmallViT(nn.Module):
    """Logits ``(B, 10)`` of images ``(B, 28, 28)`` with brightness 0 to 1: 16 patches, an encoder, mean pooling."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH**2, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn((28 // PATCH) ** 2, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Cut into patches, encode, pool, classify."""
        centred = (images - 0.29) / 0.35  # mean and deviation of Fashion-MNIST's pixels, rounded
        patches = centred.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        return self.head(self.encoder(self.embed(patches) + self.position).mean(1))


def train(x: Tensor, y: Tensor, epochs: int, seed: int, checkpoint: Path | None, depth: int = DEPTH) -> SmallViT:
    """A network trained by cross-entropy; with a checkpoint, a run that was stopped goes on from its last epoch."""
    torch.manual_seed(seed)
    model = SmallViT(depth)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True, generator=order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    total = epochs * len(loader)
    training.fit(
        model,
        lambda model, batch, step: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        loader,
        optimizer=optimizer,
        epochs=epochs,
        scheduler=training.warmup_cosine(optimizer, total, total // 10),
        schedule="step",
        max_grad_norm=1.0,
        checkpoint=checkpoint,
    )
    return model.eval()
