"""What is distilled: a vision transformer of seven blocks, a text transformer of five, and MiniLM of six."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.uncertainty.networks import VisionTransformer
from benchmarks.uncertainty.tasks import Part, Task
from benchmarks.uncertainty.texts import TextTransformer, crop
from gpseq import datasets
from gpseq.datasets.text import PADDING

#: Words of a query at most; longer ones are left out, so that padding costs little.
MAX_WORDS = 12
#: Word pieces of a review at most, with the two at its ends; longer ones are left out.
MAX_PIECES = 20


def fashion(smoke: bool = False) -> Task:
    """10,000 images of Fashion-MNIST and a vision transformer of seven blocks; digits are out of distribution.

    2,000 images validate, 2,500 of the published test images test, and 1,000 test digits are outside. A smoke test
    takes small parts of the shipped subset.

    Raises:
        FileNotFoundError: the folder that ``GPSEQ_DATA`` names is not set or lacks the whole sets.
    """
    sizes = (300, 60, 60, 40) if smoke else (10_000, 2_000, 2_500, 1_000)
    clothes, digits = (datasets.load_images(name, full=not smoke) for name in ("fashion_mnist", "mnist"))
    rows = _rows(len(clothes), 0)
    train, val = rows[: sizes[0]], rows[sizes[0] : sizes[0] + sizes[1]]
    test, outside = _rows(len(clothes.y_test), 1)[: sizes[2]], _rows(len(digits.y_test), 2)[: sizes[3]]
    return Task(
        name=f"fashion-7{'-smoke' * smoke}",
        train=Part(clothes.x_train[train].float() / 255, clothes.y_train[train]),
        val=Part(clothes.x_train[val].float() / 255, clothes.y_train[val]),
        test=Part(clothes.x_test[test].float() / 255, clothes.y_test[test]),
        shifted={},
        ood={"MNIST": Part(digits.x_test[outside].float() / 255)},
        make=lambda attention: VisionTransformer(10, attention, **_shape(7, smoke)),
        epochs=1 if smoke else 12,
        kinds=("softmax", "gp"),
        seeds=3,
    )


def intents(smoke: bool = False) -> Task:
    """9,000 short queries of CLINC150 and a text transformer of five blocks; queries out of scope are outside.

    About 60 queries of each of 150 intents. A smoke test takes few queries of fifteen intents.
    """
    texts = datasets.load_clinc150()
    found = []
    sizes = (300, 60, 60, 40) if smoke else (9_000, 1_500, 2_500, 1_000)
    for part, size in zip((texts.train, texts.val, texts.test, texts.ood), sizes, strict=True):
        if smoke and part is not texts.ood:
            part = part.select(part.labels < 15)
        short = part.select((part.ids != PADDING).sum(1) <= MAX_WORDS)
        rows = _rows(len(short), 0)
        if part is not texts.ood:
            rows = rows[_in_rounds(short.labels[rows])]
        found.append(Part(short.ids[rows[:size], :MAX_WORDS], None if part is texts.ood else short.labels[rows[:size]]))
    train, val, test, outside = found
    classes, num_words = 15 if smoke else 150, len(texts.vocabulary)
    return Task(
        name=f"intents-5{'-smoke' * smoke}",
        train=train,
        val=val,
        test=test,
        shifted={},
        ood={"out of scope": outside},
        make=lambda attention: TextTransformer(num_words, classes, MAX_WORDS, attention, **_shape(5, smoke)),
        epochs=1 if smoke else 12,
        kinds=("softmax", "gp"),
        seeds=3,
    )


def reviews(smoke: bool = False) -> Task:
    """1,000 short sentences of reviews from three domains (UCI Sentiment), and MiniLM of six blocks.

    200 sentences validate, about 800 test; 500 queries of CLINC150, which are neither praise nor blame, are outside.
    The last three blocks are fine-tuned with the head. A smoke test takes few sentences and a narrow BERT that nobody
    has trained.

    Raises:
        ImportError: the package of the weights, or transformers, is not installed.
    """
    from benchmarks.uncertainty import sentiment

    sentiment.folder()  # so that a missing package is told before anything is read
    texts, queries = datasets.load_sentiment("yelp"), datasets.load_clinc150().ood
    parts = (texts.train, texts.val, texts.test, texts.ood)
    ids = sentiment.tokenize([text for part in parts for text in part.texts])
    inside = _short(ids, torch.cat([part.labels for part in parts]))
    outside = _short(sentiment.tokenize(queries.texts))
    sizes = (60, 40, 40, 30) if smoke else (1_000, 200, 1_000, 500)
    first, second = sizes[0], sizes[0] + sizes[1]
    return Task(
        name=f"reviews-6{'-smoke' * smoke}",
        train=_taken(inside, slice(0, first)),
        val=_taken(inside, slice(first, second)),
        test=_taken(inside, slice(second, second + sizes[2])),
        shifted={},
        ood={"queries": _taken(outside, slice(0, sizes[3]))},
        make=_small_bert if smoke else sentiment.make,
        epochs=1 if smoke else 3,
        batch_size=20,
        learning_rate=sentiment.LEARNING_RATE,
        kinds=("softmax",),
        seeds=3,
    )


def sentences(smoke: bool = False) -> Tensor:
    """Ids of 16,000 short English sentences of BLiMP, about nothing in particular, in a drawn order.

    Args:
        smoke: forty of them.
    """
    from benchmarks.uncertainty import sentiment

    texts = datasets.load_blimp()
    found = dict.fromkeys(text for part in (texts.train, texts.val, texts.test) for text in part.texts)
    ids = sentiment.tokenize(list(found))
    ids = ids[(ids != PADDING).sum(1) <= MAX_PIECES][:, :MAX_PIECES]
    ids = nn.functional.pad(ids, (0, MAX_PIECES - ids.shape[1]), value=PADDING)
    return ids[_rows(len(ids), 0)[: 40 if smoke else 16_000]]


def _small_bert(attention: bool) -> nn.Module:
    """What a smoke test has in the place of MiniLM."""
    from transformers import BertConfig, BertModel

    from benchmarks.uncertainty.sentiment import SentenceClassifier

    shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 2}
    return SentenceClassifier(BertModel(BertConfig(max_position_embeddings=64, **shape), add_pooling_layer=False))


def _short(ids: Tensor, labels: Tensor | None = None) -> Part:
    """Those of few pieces, in an order that is always the same."""
    rows = ((ids != PADDING).sum(1) <= MAX_PIECES).nonzero().squeeze(-1)
    rows = rows[_rows(len(rows), 0)]
    return Part(crop(ids[rows]), None if labels is None else labels[rows])


def _taken(part: Part, rows: slice) -> Part:
    return Part(part.inputs[rows], None if part.labels is None else part.labels[rows])


def _shape(depth: int, smoke: bool) -> dict[str, int]:
    width = 16 if smoke else 64
    return {"depth": depth, "width": width, "mlp_width": 4 * width}


def _rows(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _in_rounds(labels: Tensor) -> Tensor:
    """Positions in rounds, each with one of every class that has any left."""
    seen: dict[int, int] = {}
    turn = []
    for label in labels.tolist():
        turn.append(seen.get(label, 0))
        seen[label] = turn[-1] + 1
    return torch.tensor(turn).argsort(stable=True)


# --- what is distilled of them ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A task, and how its teachers are distilled.

    Attributes:
        title: for tables.
        about: the teacher, in words.
        make: the task, from whether it is a smoke test.
        blocks: of the teacher, L.
        recipes: names of the students, and at how many seeds each is judged.
        options: of the distiller, that all students share, beside the defaults.
        later: how many blocks the student ``"later blocks"`` keeps.
        later_options: of the distiller for that one.
        epochs: how often a student sees the training part.
        batch_size: inputs in a step.
        learning_rate: peak of the rate.
        quick: names of the students of a smoke test.
        few: test inputs, and inputs outside, that moments are judged on, beside ten draws: they take long.
        more: further inputs without labels, ``(n, ...)``, from whether it is a smoke test; students that take them see
            them in one pass, each batch mixed with inputs of the training part.
        again: how often the training part comes in that pass.
    """

    title: str
    about: str
    make: Callable[[bool], Task]
    blocks: int
    recipes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    later: int = 0
    later_options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 10
    batch_size: int = 100
    learning_rate: float = 3e-3
    quick: tuple[str, ...] = ("student",)
    few: int = 300
    more: Callable[[bool], Tensor] | None = None
    again: int = 1


SETTINGS: dict[str, Setting] = {
    "fashion": Setting(
        "Fashion-MNIST, vision transformer",
        "seven blocks of width 64, four heads and 256 hidden units, 16 patches, mean pooling",
        fashion,
        7,
        {"student": 3, "plain distillation": 1, "forced, no labels": 1, "rollout, no labels": 1},
        epochs=12,
        quick=("student", "forced, no labels"),
    ),
    "intents": Setting(
        "CLINC150, text transformer",
        "five blocks of width 64, four heads and 256 hidden units, 12 words at most, mean pooling",
        intents,
        5,
        {
            "student": 3,
            "plain distillation": 1,
            "no labels": 1,
            "forced": 1,
            "forced, no labels": 1,
            "rollout, no labels": 1,
            "published": 1,
            "random steps": 1,
        },
        epochs=12,
        quick=("student", "published", "random steps"),
    ),
    "reviews": Setting(
        "UCI Sentiment, MiniLM",
        "six blocks of width 384, of which the last three are fine-tuned, 20 word pieces at most, mean pooling",
        reviews,
        6,
        {"student": 3, "plain distillation": 1, "no labels": 1, "later blocks": 1, "more text": 3},
        later=2,
        epochs=10,
        batch_size=25,
        learning_rate=1e-3,
        few=16,
        more=sentences,
        again=8,
    ),
}
