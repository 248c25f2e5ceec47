"""Trained networks, which of their weights are uncertain, and the data that predictions are judged on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.uncertainty.networks import VisionTransformer
from benchmarks.uncertainty.tasks import Part, Task
from benchmarks.uncertainty.texts import crop, mean_over_words
from benchmarks.uncertainty.training import trained
from gpseq import datasets
from gpseq.datasets.text import PADDING

#: What a network is called with: a tensor, or tensors by the names of its arguments.
Inputs = Tensor | dict[str, Tensor]
#: Words of a query, and word pieces of a sentence with the two at its ends; longer ones are left out.
MAX_WORDS, MAX_PIECES = 16, 24


@dataclass(frozen=True)
class Data:
    """Inputs of a network, and their labels where they have any.

    Attributes:
        inputs: the batch first.
        labels: ``(n,)``.
    """

    inputs: Inputs
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs if isinstance(self.inputs, Tensor) else next(iter(self.inputs.values())))

    def batches(self, size: int) -> list[Data]:
        """The same, some at a time."""
        return [self[slice(start, start + size)] for start in range(0, len(self), size)]

    def __getitem__(self, rows: Any) -> Data:
        labels = None if self.labels is None else self.labels[rows]
        if isinstance(self.inputs, Tensor):
            return Data(self.inputs[rows], labels)
        return Data({name: value[rows] for name, value in self.inputs.items()}, labels)


@dataclass(frozen=True)
class Problem:
    """A trained network and what it is judged on.

    Attributes:
        network: in eval mode; its outputs are logits.
        uncertain: patterns of the parameters that the posterior is about.
        train: what the curvature is summed over, a part of the training data.
        num_train: how many training data there are.
        val: what scalars are fitted on.
        test: from the same distribution.
        ood: from others, by name.
        features: what the head sees of inputs, and the head; ``None`` where the head is not looked at alone.
        samples: draws of Monte Carlo, few and many; the prior precision is chosen with few.
        tangents: draws of the linearised network.
        columns: directions of the forms of low rank.
        draws: from a Gaussian over logits.
        full: whether the form ``"full"`` is within reach.
        rival: whether laplace-torch can have all of the uncertain weights.
    """

    network: nn.Module
    uncertain: tuple[str, ...]
    train: Data
    num_train: int
    val: Data
    test: Data
    ood: dict[str, Data]
    features: tuple[Callable[[Inputs], Tensor], nn.Linear] | None = None
    samples: tuple[int, int] = (10, 100)
    tangents: int = 128
    columns: tuple[int, ...] = (8, 64)
    draws: int = 256
    full: bool = False
    rival: bool = False


@dataclass(frozen=True)
class Setting:
    """A network and a data set, at any seed.

    Attributes:
        title: for tables.
        about: the network, in words.
        make: the problem of a seed, from the seed, whether it is a smoke test, and the folder of trained networks.
        seeds: how many are judged.
    """

    title: str
    about: str
    make: Callable[[int, bool, Path], Problem]
    seeds: int = 3


# --- images -----------------------------------------------------------------------------------------------------------

NAMES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}


def perceptron(name: str, other: str) -> Callable[[int, bool, Path], Problem]:
    """784-64-64-10 with ReLU, on 15,000 images of one set; the other is out of distribution. All weights uncertain.

    Args:
        name: of the set, as for ``load_images``.
        other: likewise.
    """

    def make(seed: int, smoke: bool, cache: Path) -> Problem:
        sizes = (400, 30, 40, 30) if smoke else (15_000, 500, 1_000, 500)
        inside, outside = (datasets.load_images(which, full=not smoke) for which in (name, other))
        order = torch.randperm(len(inside), generator=torch.Generator().manual_seed(0))
        train, val = order[: sizes[0]], order[sizes[0] : sizes[0] + sizes[1]]
        test = torch.randperm(len(inside.y_test), generator=torch.Generator().manual_seed(1))[: sizes[2]]
        far = torch.randperm(len(outside.y_test), generator=torch.Generator().manual_seed(2))[: sizes[3]]

        def flat(images: Tensor) -> Tensor:
            return images.flatten(1).float() / 255

        task = Task(
            name=f"onepass-{name}{'-smoke' * smoke}",
            train=Part(flat(inside.x_train[train]), inside.y_train[train]),
            val=Part(flat(inside.x_train[val]), inside.y_train[val]),
            test=Part(flat(inside.x_test[test]), inside.y_test[test]),
            shifted={},
            ood={NAMES[other]: Part(flat(outside.x_test[far]))},
            make=lambda attention: nn.Sequential(
                nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
            ),
            epochs=2 if smoke else 15,
        )
        network = trained(task, "softmax", seed, cache).network
        return Problem(network, ("*",), *_parts(task), full=True, rival=True)

    return make


def vision(seed: int, smoke: bool, cache: Path) -> Problem:
    """The small vision transformer on Fashion-MNIST; the last two of four layers, the norm and the head uncertain."""
    from benchmarks.uncertainty.images import fashion

    task = fashion(smoke)
    network = trained(task, "softmax", seed, cache).network
    assert isinstance(network, VisionTransformer)
    sizes = (50, 30, 30, 20) if smoke else (3_000, 500, 1_000, 500)
    parts = _parts(task, sizes)
    uncertain = ("layers.2.*", "layers.3.*", "norm.*", "head.*")
    return Problem(network, uncertain, *parts, features=(network.features, network.head))  # type: ignore[arg-type]


# --- texts ------------------------------------------------------------------------------------------------------------


class LastWord(nn.Module):
    """A GPT-2 that classifies sentences of ids ``(B, T)``, of which 0 is padding at the end, by their last word."""

    def __init__(self, num_words: int, num_classes: int, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2ForSequenceClassification

        config = GPT2Config(
            vocab_size=num_words,
            n_positions=MAX_WORDS,
            n_embd=width,
            n_layer=depth,
            n_head=heads,
            num_labels=num_classes,
            pad_token_id=PADDING,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
        self.gpt = GPT2ForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        return self.gpt(input_ids=ids).logits


def gpt2(seed: int, smoke: bool, cache: Path) -> Problem:
    """A GPT-2 of two blocks on the intents of CLINC150, all weights uncertain but those of the embeddings."""
    task = _queries(
        f"onepass-gpt2{'-smoke' * smoke}",
        (300, 60, 60, 40) if smoke else (9_000, 500, 1_000, 500),
        lambda texts: lambda attention: LastWord(len(texts.vocabulary), 150),
        epochs=1 if smoke else 15,
    )
    network = trained(task, "softmax", seed, cache).network
    parts = _parts(task, (40, 30, 30, 20) if smoke else (3_000, 300, 1_000, 500))
    uncertain = ("transformer.h.*", "transformer.ln_f.*", "score.*")
    return Problem(network.gpt, uncertain, *parts, draws=128)  # type: ignore[arg-type]


class Tail(nn.Module):
    """The end of an encoder: layers, the mean over words, and a head.

    Args:
        layers: of BERT.
        head: linear.
    """

    def __init__(self, layers: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = head

    def features(self, x: Tensor, mask: Tensor, share: Tensor) -> Tensor:
        """``(B, width)``, what the head sees."""
        for layer in self.layers:
            x = layer(x, mask)
        return (x * share).sum(1)

    def forward(self, x: Tensor, mask: Tensor, share: Tensor) -> Tensor:
        """Logits ``(B, C)`` of tokens ``(B, T, width)``.

        Args:
            x: tokens.
            mask: added to the scores of attention, ``(B, 1, 1, T)``.
            share: of each word in the mean, ``(B, T, 1)``.
        """
        for layer in self.layers:
            x = layer(x, mask)
        return self.head((x * share).sum(1))


def split_encoder(network: Any, uncertain: int = 2) -> tuple[Tail, Callable[[Tensor], dict[str, Tensor]]]:
    """The last layers of a sentence classifier, and what comes before them.

    What comes before is certain: it is run once, for all contenders.

    Args:
        network: a ``SentenceClassifier``.
        uncertain: layers at the end.

    Returns:
        The tail, and the function from ids to what it takes.
    """
    layers = network.bert.encoder.layer
    tail = Tail(list(layers[-uncertain:]), network.head).eval()

    @torch.no_grad()
    def encode(ids: Tensor) -> dict[str, Tensor]:
        words = ids != PADDING
        states = [
            network.bert(input_ids=part, attention_mask=(part != PADDING).long(), output_hidden_states=True)
            for part in ids.split(100)
        ]
        x = torch.cat([state.hidden_states[-1 - uncertain] for state in states])
        far = torch.finfo(x.dtype).min
        mask = torch.zeros(words.shape).masked_fill(~words, far)[:, None, None]
        share = words.to(x.dtype) / words.sum(1, keepdim=True)
        return {"x": x, "mask": mask, "share": share.unsqueeze(-1)}

    rows = torch.tensor([[101, 2003, 102], [101, 102, PADDING]])
    with torch.no_grad():
        tokens = network.bert(input_ids=rows, attention_mask=(rows != PADDING).long()).last_hidden_state
        expected = network.head(mean_over_words(tokens, rows == PADDING))
        torch.testing.assert_close(tail(**encode(rows)), expected, rtol=1e-3, atol=1e-3)
    return tail, encode


def sentiment(seed: int, smoke: bool, cache: Path) -> Problem:
    """MiniLM on praise and blame; the last two of six layers and the head uncertain."""
    from benchmarks.uncertainty.sentiment import sentiment as make

    task = make(smoke)
    return _minilm(task, seed, cache, (40, 30, 30, 20) if smoke else (600, 200, 200, 200))


def minilm(seed: int, smoke: bool, cache: Path) -> Problem:
    """MiniLM on the intents of CLINC150, fine-tuned on 15 queries of each; the last two layers and the head uncertain."""
    from benchmarks.uncertainty.sentiment import make, tokenize

    def network(attention: bool) -> nn.Module:
        made = make()
        made.head = nn.Linear(made.head.in_features, 150)
        return made

    task = _queries(
        f"onepass-minilm{'-smoke' * smoke}",
        (50, 30, 30, 20) if smoke else (2_250, 300, 300, 300),
        lambda texts: network,
        epochs=1 if smoke else 4,
        tokenize=tokenize,
        batch_size=25,
        learning_rate=3e-4,
    )
    return _minilm(task, seed, cache, (30, 30, 30, 20) if smoke else (600, 150, 250, 200))


def _minilm(task: Task, seed: int, cache: Path, sizes: tuple[int, int, int, int]) -> Problem:
    network = trained(task, "softmax", seed, cache).network
    tail, encode = split_encoder(network)
    train, num_train, val, test, ood = _parts(task, sizes, MAX_PIECES)

    def encoded(data: Data) -> Data:
        assert isinstance(data.inputs, Tensor)
        return Data(encode(data.inputs), data.labels)

    parts = (encoded(train), num_train, encoded(val), encoded(test), {name: encoded(x) for name, x in ood.items()})
    features = (lambda inputs: tail.features(**inputs), tail.head)
    few = task.num_classes == 2  # many classes take long
    columns, draws = ((8, 64), 256) if few else ((8, 32), 128)
    return Problem(tail, ("*",), *parts, features=features, tangents=32, columns=columns, draws=draws)  # type: ignore[arg-type]


def _queries(
    name: str,
    sizes: tuple[int, int, int, int],
    make: Callable[[Any], Callable[[bool], nn.Module]],
    epochs: int,
    tokenize: Callable[[list[str]], Tensor] | None = None,
    **settings: Any,
) -> Task:
    """CLINC150 in short queries: training, validation, test, and those out of scope."""
    texts = datasets.load_clinc150()
    found = []
    for part, size in zip((texts.train, texts.val, texts.test, texts.ood), sizes, strict=True):
        short = part.select((part.ids != PADDING).sum(1) <= MAX_WORDS)
        # Training queries are balanced over the intents: the first of each come first.
        rows = torch.randperm(len(short), generator=torch.Generator().manual_seed(0))
        if part is texts.train:
            rows = _balanced(short.labels[rows], rows)
        chosen = short.select(rows[:size])
        ids = chosen.ids[:, :MAX_WORDS] if tokenize is None else tokenize(list(chosen.texts))
        found.append(Part(ids, None if part is texts.ood else chosen.labels))
    train, val, test, ood = found
    return Task(name, train, val, test, {}, {"out of scope": ood}, make(texts), epochs, **settings)


def _balanced(labels: Tensor, rows: Tensor) -> Tensor:
    """Rows in rounds, each with one of every class that has any left."""
    seen: dict[int, int] = {}
    turn = []
    for label in labels.tolist():
        turn.append(seen.get(label, 0))
        seen[label] = turn[-1] + 1
    return rows[torch.tensor(turn).argsort(stable=True)]


def _parts(
    task: Task, sizes: tuple[int | None, ...] = (None, None, None, None), longest: int | None = None
) -> tuple[Data, int, Data, Data, dict[str, Data]]:
    """The first of each part; with a length, of the sentences that are no longer."""

    def taken(part: Part, size: int | None) -> Data:
        data = Data(part.inputs, part.labels)
        if longest is not None:
            data = data[(part.inputs != PADDING).sum(1) <= longest]
        data = data[:size]
        return data if longest is None else Data(crop(data.inputs), data.labels)  # type: ignore[arg-type]

    outside = {name: taken(part, sizes[3]) for name, part in task.ood.items()}
    return taken(task.train, sizes[0]), len(task.train), taken(task.val, sizes[1]), taken(task.test, sizes[2]), outside


SETTINGS: dict[str, Setting] = {
    "mnist": Setting(
        "perceptron, MNIST", "784-64-64-10 with ReLU; all weights uncertain", perceptron("mnist", "fashion_mnist")
    ),
    "fashion_mnist": Setting(
        "perceptron, Fashion-MNIST",
        "784-64-64-10 with ReLU; all weights uncertain",
        perceptron("fashion_mnist", "mnist"),
    ),
    "vision": Setting(
        "vision transformer, Fashion-MNIST",
        "four layers of width 64, 16 patches; the last two, the norm and the head uncertain",
        vision,
    ),
    "gpt2": Setting(
        "GPT-2, intents",
        "two blocks of width 64 on CLINC150; all uncertain but the embeddings",
        gpt2,
    ),
    "sentiment": Setting("MiniLM, sentiment", "six layers; the last two and the head uncertain", sentiment, 1),
    "minilm": Setting(
        "MiniLM, intents", "six layers, fine-tuned on CLINC150; the last two and the head uncertain", minilm, 1
    ),
}
