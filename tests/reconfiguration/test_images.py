"""Small images: how much a student keeps of its teacher, and what draws add."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from gpseq import predict
from gpseq.datasets.images import load_images
from gpseq.reconfiguration import Distiller

WIDTH = 32


class Images(nn.Module):
    """Sixteen patches, a few blocks, and the mean of the tokens."""

    def __init__(self, depth=3):
        super().__init__()
        self.embed = nn.Linear(49, WIDTH)
        self.position = nn.Parameter(torch.randn(16, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.position).mean(1))


def patches(images):
    return images.float().div(64).unflatten(1, (4, 7)).unflatten(3, (4, 7)).transpose(2, 3).flatten(3).flatten(1, 2)


@pytest.mark.slow
def test_a_student_keeps_accuracy_and_more_draws_help():
    images = load_images("mnist")
    order = torch.randperm(len(images.x_train), generator=torch.Generator().manual_seed(0))[:1500]
    train = TensorDataset(patches(images.x_train[order]), images.y_train[order])
    test = torch.randperm(len(images.x_test), generator=torch.Generator().manual_seed(1))[:500]
    x, y = patches(images.x_test[test]), images.y_test[test]

    teacher, epochs = Images(), 12
    loader = DataLoader(train, 100, shuffle=True, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(teacher.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, epochs * len(loader))
    for _ in range(epochs):
        for inputs, labels in loader:
            optimizer.zero_grad()
            functional.cross_entropy(teacher(inputs), labels).backward()
            optimizer.step()
            schedule.step()
    distiller = Distiller(teacher.eval(), generator=torch.Generator().manual_seed(0))
    distiller.fit(loader, 8, progress=False)

    def accuracy(scores):
        return (scores.argmax(-1) == y).double().mean().item()

    def negative_log_likelihood(probs):
        return -probs.log()[torch.arange(len(y)), y].mean().item()

    with torch.no_grad():
        best = accuracy(teacher(x))
        found = predict(distiller.student, x, num_samples=10, generator=torch.Generator().manual_seed(0))
    assert best > 0.8
    assert accuracy(found.probs()) > best - 0.05
    singles = [negative_log_likelihood(draw) for draw in found.samples.softmax(-1)]
    assert negative_log_likelihood(found.probs()) < sum(singles) / 10
    assert 0 < found.mutual_information().mean() < found.entropy().mean()
