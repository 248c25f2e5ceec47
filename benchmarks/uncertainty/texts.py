"""Sentences as tasks: intents of queries, where words are enough, and agreement in grammar, where they are not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.uncertainty.networks import encoder_layers
from benchmarks.uncertainty.tasks import Part, Task
from gpseq import datasets
from gpseq.datasets.text import PADDING, UNKNOWN, WORD_ORDER, Sentences, Vocabulary, split_words

#: Severities of a corruption, from 1.
SEVERITIES = range(1, 6)
#: What sentences are put into, one inside the other; what follows stays as good or bad as it was.
CLAUSES = (
    "Susan knows that",
    "Robert thinks that",
    "Linda discovered that",
    "Carl knows that",
    "Mary remembers that",
)
#: Paradigms of ``load_blimp("agreement")`` that are kept from training, and how they are called here.
NEW = {
    "determiner_noun_agreement_with_adj_irregular_2": "new: adjective",
    "irregular_plural_subject_verb_agreement_2": "new: irregular plural",
    "distractor_agreement_relative_clause": "new: relative clause",
}
#: Other constructions. The paradigm of a reflexive and two names is no other: it asks for agreement.
OTHER = [name for name in WORD_ORDER if name != "principle_A_domain_3"]


class TextTransformer(nn.Module):
    """A small encoder of word ids ``(B, T)``, of which 0 is padding: learnt positions, mean pooling over words.

    Args:
        num_words: V, ids that there are.
        num_classes: C.
        max_length: T at most. Padding counts only as far as the longest sentence of a batch.
        attention: false for the control, whose words meet at the pooling only: its logits are a linear function of a
            mean over words of what each word is at its place.
        width: of the tokens.
        heads: of each attention.
        depth: number of layers.
        mlp_width: hidden units of the perceptrons.
        dropout: probability.

    Raises:
        ValueError: in a call, if a sentence has no word or more than ``max_length``.
    """

    def __init__(
        self,
        num_words: int,
        num_classes: int,
        max_length: int,
        attention: bool = True,
        width: int = 64,
        heads: int = 4,
        depth: int = 2,
        mlp_width: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.embed = nn.Embedding(num_words, width, padding_idx=PADDING)
        self.position = nn.Parameter(torch.randn(max_length, width) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.layers = encoder_layers(width, heads, mlp_width, depth, dropout, attention)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def features(self, ids: Tensor) -> Tensor:
        """``(B, width)``, what the head sees."""
        ids = crop(ids)
        length = ids.shape[1]
        if length > len(self.position):
            raise ValueError(f"ids: got a sentence of {length} words, expected {len(self.position)} at most")
        padding = ids == PADDING
        tokens = self.dropout(self.embed(ids) + self.position[:length])
        for layer in self.layers:
            tokens = layer(tokens, src_key_padding_mask=padding) if self.attention else layer(tokens)
        return mean_over_words(self.norm(tokens), padding)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        return self.head(self.features(ids))

    def extra_repr(self) -> str:
        """What the representation of the parts does not say."""
        return f"max_length={len(self.position)}"


def crop(ids: Tensor) -> Tensor:
    """Ids ``(B, T)`` without the columns that are padding in every row.

    Raises:
        ValueError: if a row has no word.
    """
    words = ids != PADDING
    if not words.any(1).all():
        row = int(words.any(1).logical_not().nonzero()[0])
        raise ValueError(f"ids: got row {row} with nothing but padding, expected one word at least")
    return ids[:, : int(words.any(0).nonzero().max()) + 1]


def mean_over_words(tokens: Tensor, padding: Tensor) -> Tensor:
    """The mean ``(B, width)`` of tokens ``(B, T, width)`` that are no padding ``(B, T)``."""
    return tokens.masked_fill(padding.unsqueeze(-1), 0).sum(1) / (~padding).sum(1, keepdim=True)


# --- tasks ------------------------------------------------------------------------------------------------------------


def intents(smoke: bool = False) -> Task:
    """150 intents of queries to an assistant (CLINC150), and queries that are none of them.

    Its 15,000, 3000 and 4500 published queries, without the few whose words are in an earlier part. Shifted: 500 test
    queries with words left out, mistyped, or in another place, at five severities; the intents stay. Out of
    distribution: the 1000 queries out of scope. A smoke test takes few queries of fifteen intents.

    This is **no** task for attention: a network without any is as good.
    """
    texts = datasets.load_clinc150()
    train, val, test = _apart(texts.train, texts.val, texts.test)
    outside = texts.ood
    if smoke:
        # Classes are ordered by domain, so these are one domain.
        train, val, test = (part.select(part.labels < 15) for part in (train, val, test))
        train, val, test, outside = (
            _some(part, n) for part, n in ((train, 300), (val, 60), (test, 120), (outside, 60))
        )
    some = _some(test, 40 if smoke else 500)
    corruptions = {"left out": leave_out, "mistyped": mistype, "moved": move}
    return _task(
        "intents-smoke" if smoke else "intents",
        (train, val, test),
        {
            f"{kind} {severity}": _part(some, texts.vocabulary, _corrupted(some, corruption, severity))
            for kind, corruption in corruptions.items()
            for severity in SEVERITIES
        },
        {"out of scope": _part(outside, labels=False)},
        texts.vocabulary,
        num_classes=15 if smoke else 150,
        epochs=1 if smoke else 15,
        seeds=3,
        kinds=("softmax", "none", "sngp", "gp"),
    )


def agreement(smoke: bool = False) -> Task:
    """Whether the words of a sentence agree (BLiMP): number of noun and verb, of noun and determiner, of anaphors.

    13 of the 16 paradigms of ``load_blimp("agreement")``, 20,800 sentences for training. Each comes with its twin that
    differs in one word, with the other label, and each form of a word occurs in sentences of both labels, so what each
    word is at its place tells little: the task is one for attention.

    Shifted: the three paradigms that are held out, which differ much in how far they are away; 500 test sentences with
    words mistyped, at five severities; and the same inside of one to five clauses ("Susan knows that ..."). Out of
    distribution is here what is unlike the training set, whatever one may say of its grammar: ``"shuffled"``, the
    words of test sentences in random order; ``"other grammar"``, sentences of the kind ``"order"``, about islands,
    ellipsis and scope, that have at most one unknown word; and ``"queries"`` of CLINC150, in which more than half of
    the words are unknown. A smoke test takes small parts of all.
    """
    texts = datasets.load_blimp("agreement", held_out=list(NEW))
    train, val, test = _apart(texts.train, texts.val, texts.test)
    (new,) = _apart(texts.ood, seen=(train, val, test))
    order = datasets.load_blimp(OTHER[:2] if smoke else OTHER)
    queries = datasets.load_clinc150().ood
    unknown = (texts.vocabulary.pad(order.train.texts)[0] == UNKNOWN).sum(1)
    other = order.train.select(unknown <= 1)
    held_out = {title: new.select(new.groups == texts.groups.index(name)) for name, title in NEW.items()}
    if smoke:
        train, val, test = _some(train, 400), _some(val, 80), _some(test, 160)
    held_out = {title: _some(part, 40 if smoke else 1000) for title, part in held_out.items()}
    some, few = _some(test, 40 if smoke else 500), 40 if smoke else 500
    shifted = {title: _part(part) for title, part in held_out.items()}
    for kind, corruption in (("mistyped", mistype), ("embedded", _embed)):
        for severity in SEVERITIES:
            shifted[f"{kind} {severity}"] = _part(some, texts.vocabulary, _corrupted(some, corruption, severity))
    return _task(
        "agreement-smoke" if smoke else "agreement",
        (train, val, test),
        shifted,
        {
            "shuffled": _part(_some(test, few), texts.vocabulary, _corrupted(_some(test, few), _shuffle, 1), False),
            "other grammar": _part(_some(other, few), texts.vocabulary, _some(other, few).texts, False),
            "queries": _part(_some(queries, few), texts.vocabulary, _some(queries, few).texts, False),
        },
        texts.vocabulary,
        num_classes=2,
        epochs=1 if smoke else 12,
        positions=31,  # as many as the longest sentence has of all that could be taken
    )


def _task(
    name: str,
    parts: Iterable[Sentences],
    shifted: dict[str, Part],
    ood: dict[str, Part],
    vocabulary: Vocabulary,
    num_classes: int,
    epochs: int,
    seeds: int = 5,
    positions: int = 0,
    kinds: tuple[str, ...] = Task.kinds,
) -> Task:
    train, val, test = (_part(part) for part in parts)
    longest = max(part.inputs.shape[1] for part in (train, val, test, *shifted.values(), *ood.values()))
    longest = max(longest, positions)
    num_words = len(vocabulary)
    return Task(
        name=name,
        train=train,
        val=val,
        test=test,
        shifted=shifted,
        ood=ood,
        make=lambda attention: TextTransformer(num_words, num_classes, longest, attention),
        epochs=epochs,
        kinds=kinds,
        seeds=seeds,
    )


def _part(
    sentences: Sentences, vocabulary: Vocabulary | None = None, texts: Sequence[str] = (), labels: bool = True
) -> Part:
    """Sentences with their labels; with a vocabulary, other texts in their place."""
    ids = sentences.ids if vocabulary is None else vocabulary.pad(texts)[0]
    return Part(crop(ids), sentences.labels if labels else None)


def _apart(*parts: Sentences, seen: Iterable[Sentences] = ()) -> tuple[Sentences, ...]:
    """Each part without the sentences whose words are in one before it."""
    before = {tuple(split_words(text)) for part in seen for text in part.texts}
    kept = []
    for part in parts:
        words = [tuple(split_words(text)) for text in part.texts]
        kept.append(part.select(torch.tensor([row not in before for row in words])))
        before.update(words)
    return tuple(kept)


def _some(sentences: Sentences, count: int) -> Sentences:
    """So many of them, always the same ones; all, if there are fewer."""
    return sentences.select(torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0))[:count])


# --- corruptions ------------------------------------------------------------------------------------------------------


def _corrupted(
    sentences: Sentences, corruption: Callable[[str, float, random.Random], str], severity: int
) -> list[str]:
    """Each sentence at a severity, which is the tenths of its words that are touched, on average."""
    # One stream of draws for all severities: what is touched at one is touched at the next.
    return [corruption(text, severity / 10, random.Random(row)) for row, text in enumerate(sentences.texts)]


def leave_out(text: str, fraction: float, draws: random.Random) -> str:
    """A text without some of its words, of which one stays at least.

    Args:
        text: any text.
        fraction: probability that a word is left out.
        draws: random numbers, one for each word.
    """
    words = split_words(text)
    numbers = [draws.random() for _ in words]
    kept = [word for word, number in zip(words, numbers, strict=True) if number >= fraction]
    return " ".join(kept or words[:1])


def mistype(text: str, fraction: float, draws: random.Random) -> str:
    """A text with some of its words mistyped: two letters swapped, one left out, or one typed twice.

    To a vocabulary of words most of these words are unknown.

    Args:
        text: any text.
        fraction: probability that a word of two letters or more is mistyped.
        draws: random numbers, three for each word.
    """
    return " ".join(
        _mistyped(word, kind, place) if number < fraction and len(word) > 1 and word.isalpha() else word
        for word in split_words(text)
        for number, kind, place in ((draws.random(), draws.random(), draws.random()),)
    )


def _mistyped(word: str, kind: float, place: float) -> str:
    """The word with one mistake; ``kind`` and ``place`` are from 0 to 1."""
    letter = int(place * (len(word) - 1))
    before, here, after, rest = word[:letter], word[letter], word[letter + 1], word[letter + 2 :]
    # Two letters that are alike cannot be seen to be swapped.
    if kind < 1 / 3 and here != after:
        return before + after + here + rest
    if kind < 2 / 3:
        return before + after + rest
    return before + here + here + after + rest


def move(text: str, fraction: float, draws: random.Random) -> str:
    """A text in which some words have changed places among themselves.

    Args:
        text: any text.
        fraction: half the probability that a word is one of them, so that all are at 0.5.
        draws: random numbers, two for each word.
    """
    words = split_words(text)
    numbers = [(draws.random(), draws.random()) for _ in words]
    places = [place for place, (number, _) in enumerate(numbers) if number < 2 * fraction]
    moved = list(words)
    for place, source in zip(places, sorted(places, key=lambda place: numbers[place][1]), strict=True):
        moved[place] = words[source]
    return " ".join(moved)


def _shuffle(text: str, fraction: float, draws: random.Random) -> str:
    return move(text, 0.5, draws)


def _embed(text: str, fraction: float, draws: random.Random) -> str:
    """The text inside of as many clauses as the fraction has tenths."""
    return " ".join((*CLAUSES[: round(10 * fraction)], text))
