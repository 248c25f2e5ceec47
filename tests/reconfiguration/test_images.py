"""Small images: what a student keeps of its teacher, and what draws buy."""

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
        self.position = nn.Parameter(0.02 * torch.randn(16, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.position).mean(1))


def patches(images):
    return images.float().div(255).unflatten(1, (4, 7)).unflatten(3, (4, 7)).transpose(2, 3).flatten(3).flatten(1, 2)


@pytest.fixture(scope="module")
def data():
    images = load_images("mnist")
    order = torch.randperm(len(images.x_train), generator=torch.Generator().manual_seed(0))[:1000]
    train = TensorDataset(patches(images.x_train[order]), images.y_train[order])
    test = torch.randperm(len(images.x_test), generator=torch.Generator().manual_seed(1))[:800]
    return train, patches(images.x_test[test]), images.y_test[test]


@pytest.fixture(scope="module")
def teacher(data):
    torch.manual_seed(0)
    model = Images()
    loader = DataLoader(data[0], 64, shuffle=True, generator=torch.Generator().manual_seed(0))
    epochs = 10
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * len(loader))
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def distilled(teacher, data, labels=True, epochs=10, **options):
    torch.manual_seed(0)
    order = torch.Generator().manual_seed(0)
    train = data[0] if labels else TensorDataset(data[0].tensors[0])
    made = Distiller(teacher, generator=torch.Generator().manual_seed(0), **options)
    made.fit(DataLoader(train, 64, shuffle=True, generator=order), epochs, progress=False)
    return made.student


def accuracy(probs, labels):
    return (probs.argmax(-1) == labels).double().mean().item()


@pytest.mark.slow
def test_a_student_keeps_accuracy_and_more_draws_help(teacher, data):
    _, x, y = data
    student = distilled(teacher, data)
    with torch.no_grad():
        top = accuracy(teacher(x), y)
        draws = [predict(student, x, num_samples=n, generator=torch.Generator().manual_seed(0)) for n in (1, 10)]
    nll = [-found.probs().log()[torch.arange(len(y)), y].mean().item() for found in draws]
    forced = distilled(teacher, data, labels=False, path_loss="mse", forcing="teacher", task_loss=None)
    rolled = distilled(teacher, data, labels=False, path_loss="mse", task_loss=None)
    with torch.no_grad():
        found = {"teacher": top, "student": accuracy(draws[1].probs(), y)}
        found |= {"forced": accuracy(forced(x), y), "rollout": accuracy(rolled(x), y)}
    print(found, nll)
    assert top > 0.85
    assert found["student"] > top - 0.03
    assert nll[1] <= nll[0]
    assert found["rollout"] > found["forced"] + 0.01
    assert found["rollout"] > top - 0.05
