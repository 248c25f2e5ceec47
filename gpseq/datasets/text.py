"""Sentences with labels as padded word ids: intents, minimal pairs of grammar, and opinions in three domains."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gpseq.datasets.bundled import path
from gpseq.datasets.images import FOLDER_VARIABLE
from gpseq.sampling import row_key

PADDING, UNKNOWN = 0, 1
SPECIAL = ("<pad>", "<unk>")
OUT_OF_SCOPE = "out of scope"
DOMAINS = ("amazon_cells", "imdb", "yelp")
# Both sentences of a pair have the same words, in all 1000 pairs of each.
WORD_ORDER = (
    "adjunct_island",
    "complex_NP_island",
    "coordinate_structure_constraint_complex_left_branch",
    "ellipsis_n_bar_1",
    "existential_there_quantifiers_2",
    "left_branch_island_echo_question",
    "left_branch_island_simple_question",
    "only_npi_scope",
    "principle_A_domain_3",
    "principle_A_reconstruction",
    "sentential_negation_npi_scope",
    "sentential_subject_island",
)
AGREEMENT = (
    "anaphor_gender_agreement",
    "anaphor_number_agreement",
    "determiner_noun_agreement_1",
    "determiner_noun_agreement_2",
    "determiner_noun_agreement_irregular_1",
    "determiner_noun_agreement_irregular_2",
    "determiner_noun_agreement_with_adj_2",
    "determiner_noun_agreement_with_adj_irregular_1",
    "determiner_noun_agreement_with_adj_irregular_2",
    "determiner_noun_agreement_with_adjective_1",
    "distractor_agreement_relational_noun",
    "distractor_agreement_relative_clause",
    "irregular_plural_subject_verb_agreement_1",
    "irregular_plural_subject_verb_agreement_2",
    "regular_plural_subject_verb_agreement_1",
    "regular_plural_subject_verb_agreement_2",
)
# For each, something like it stays in the training set.
HELD_OUT = (
    "left_branch_island_simple_question",
    "principle_A_reconstruction",
    "sentential_negation_npi_scope",
    "determiner_noun_agreement_with_adj_irregular_2",
    "distractor_agreement_relative_clause",
    "irregular_plural_subject_verb_agreement_2",
)
KINDS = {"order": WORD_ORDER, "agreement": AGREEMENT}

# A word keeps the apostrophes inside it; any other sign stands alone.
_WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
_BLIMP_COLUMNS = ("paradigm", "sentence_good", "sentence_bad")


def split_words(text: str) -> list[str]:
    """The words and signs of a text, in lower case.

    Args:
        text: any text.

    Returns:
        Words, with the apostrophes inside them, and every other sign by itself; white space is dropped.

    Example:
        >>> split_words("What's the APR, today?")
        ["what's", 'the', 'apr', ',', 'today', '?']
    """
    return _WORD.findall(text.lower().replace("’", "'"))


@dataclass(frozen=True)
class Vocabulary:
    """The words that have an id of their own.

    Attributes:
        words: the word of each id. The first two are ``"<pad>"``, which fills short rows, and ``"<unk>"``, which
            stands for every word that is not here.

    Raises:
        ValueError: if the first two are others, or a word comes twice.

    Example:
        >>> vocabulary = Vocabulary.build(["pay the bill", "the bill"])
        >>> vocabulary.words
        ('<pad>', '<unk>', 'bill', 'the', 'pay')
        >>> vocabulary.pad(["pay the rent", "bill"])
        (tensor([[4, 3, 1],
                [2, 0, 0]]), tensor([3, 1]))
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.words[:2] != SPECIAL or len(set(self.words)) < len(self.words):
            raise ValueError(f"words: got {self.words[:4]} ..., expected {SPECIAL} and then different words")

    @classmethod
    def build(cls, texts: Iterable[str], min_count: int = 1) -> Vocabulary:
        """The words of some texts, the most frequent first, equally frequent ones in alphabetical order.

        Args:
            texts: of the training set. The order does not matter.
            min_count: words that are rarer than this have no id. At 1 the texts have no unknown word, and a model
                never learns what ``"<unk>"`` means.

        Raises:
            ValueError: if ``min_count`` is below 1.
        """
        if min_count < 1:
            raise ValueError(f"min_count: got {min_count}, expected at least 1")
        counts = Counter(word for text in texts for word in split_words(text))
        kept = [word for word, count in counts.items() if count >= min_count]
        return cls((*SPECIAL, *sorted(kept, key=lambda word: (-counts[word], word))))

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        """The id of each word; a text without words is one ``"<unk>"``, so that no row is nothing but padding.

        Args:
            text: any text.
        """
        return [self._ids.get(word, UNKNOWN) for word in split_words(text)] or [UNKNOWN]

    def decode(self, ids: Iterable[int] | Tensor) -> list[str]:
        """The words of some ids, without the padding.

        Args:
            ids: from :meth:`encode` or a row of :meth:`pad`.
        """
        numbers = ids.tolist() if isinstance(ids, Tensor) else ids
        return [self.words[number] for number in numbers if number != PADDING]

    def pad(self, texts: Sequence[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        """The texts as rows of equal length.

        Args:
            texts: n of them.
            length: T, the length of the rows; longer texts lose their end. ``None``: the length of the longest.

        Returns:
            Ids ``(n, T)`` int64, filled up with 0 at the end, and the lengths ``(n,)`` int64, from 1 to T.

        Raises:
            ValueError: if ``length`` is below 1.
        """
        if length is not None and length < 1:
            raise ValueError(f"length: got {length}, expected at least 1")
        rows = [self.encode(text)[:length] for text in texts]
        width = length or max(map(len, rows), default=0)
        ids = torch.full((len(rows), width), PADDING, dtype=torch.int64)
        for row, numbers in zip(ids, rows, strict=True):
            row[: len(numbers)] = torch.tensor(numbers)
        return ids, torch.tensor([len(numbers) for numbers in rows], dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Sentences:
    """Sentences with labels: one part of a set.

    Attributes:
        texts: n sentences as they were written, for those who bring a tokenizer of their own.
        ids: ``(n, T)`` int64, word ids, filled up with 0 at the end.
        lengths: ``(n,)`` int64, words of each, from 1 to T.
        labels: ``(n,)`` int64, the index of each label in ``classes`` of the set; -1 for one that is not there.
        groups: ``(n,)`` int64, the index of each one's domain or paradigm in ``groups`` of the set.
    """

    texts: tuple[str, ...]
    ids: Tensor  # (n, T)
    lengths: Tensor  # (n,)
    labels: Tensor  # (n,)
    groups: Tensor  # (n,)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def padding_mask(self) -> Tensor:
        """``(n, T)`` bool, True where there is no word: the ``key_padding_mask`` of attention."""
        return torch.arange(self.ids.shape[1]) >= self.lengths[:, None]

    def select(self, rows: Tensor) -> Sentences:
        """Some of the sentences.

        Args:
            rows: ``(m,)`` their numbers, or ``(n,)`` bool.
        """
        numbers = torch.arange(len(self))[rows]
        texts = tuple(self.texts[number] for number in numbers.tolist())
        return Sentences(texts, *(part[numbers] for part in (self.ids, self.lengths, self.labels, self.groups)))


@dataclass(frozen=True, eq=False)
class Texts:
    """A set of sentences, split, with one vocabulary from its training part.

    Attributes:
        train: what models learn from.
        val: for early stopping and calibration; from where ``train`` is from.
        test: from where ``train`` is from.
        ood: from elsewhere; each loader says what that is.
        vocabulary: words of ``train``.
        classes: the name of each label.
        groups: the name of each domain or paradigm.
        name: a title for a figure.
        source: who made it.
    """

    train: Sentences
    val: Sentences
    test: Sentences
    ood: Sentences
    vocabulary: Vocabulary
    classes: tuple[str, ...]
    groups: tuple[str, ...]
    name: str
    source: str

    def __len__(self) -> int:
        return len(self.train)


class _Row(NamedTuple):
    """One sentence; a label that is no class becomes -1."""

    text: str
    label: str
    group: str


def load_clinc150(
    out_of_scope: str = "test", held_out: Sequence[str] = (), min_count: int = 2, max_length: int | None = None
) -> Texts:
    """Short queries to an assistant, of 150 intents in ten domains, and queries that are none of them (CLINC150).

    ``train`` (100 queries an intent), ``val`` (20) and ``test`` (30) are the published parts, and ``ood`` is what the
    assistant cannot serve, with label -1. Of the 7500 queries of ``val`` and ``test``, eight have the words of one of
    ``train``.

    Args:
        out_of_scope: which of the three published out-of-scope parts ``ood`` is: ``"test"`` (1000 queries), ``"val"``
            or ``"train"`` (100 each, to choose a threshold with, or to train on).
        held_out: domains whose intents leave ``train``, ``val``, ``test`` and ``classes``, such as ``["banking"]``.
            Their queries of the part that ``out_of_scope`` names come first in ``ood``, before those that are out of
            scope.
        min_count: words rarer than this in ``train`` are ``"<unk>"``.
        max_length: words at most, signs counted; ``None``: as many as the longest query has, 28.

    Returns:
        15,000, 3000, 4500 and 1000 queries; groups are the domains, in alphabetical order, and then ``"out of
        scope"``; classes are ordered by domain, and then by name.

    Raises:
        ValueError: if there is no such part or domain, if all domains are held out, or if ``min_count`` or
            ``max_length`` is below 1.

    Source:
        Larson et al. (2019), An evaluation dataset for intent classification and out-of-scope prediction.

    Example:
        >>> texts = load_clinc150()
        >>> texts.train.ids.shape[0], len(texts.test), len(texts.ood), len(texts.classes)
        (15000, 4500, 1000, 150)
        >>> texts.ood.texts[0], texts.ood.labels[0].item()
        ('how much has the dow changed today', -1)
    """
    if out_of_scope not in ("train", "val", "test"):
        raise ValueError(f"out_of_scope: got {out_of_scope!r}, expected 'train', 'val' or 'test'")
    rows = _table(path("clinc150.csv.gz"))
    domains = sorted({row["domain"] for row in rows} - {"oos"})
    away = _names(held_out, "held_out", domains)
    if set(away) == set(domains):
        raise ValueError(f"held_out: got all {len(domains)} domains, expected one at least to stay")
    parts: dict[str, list[_Row]] = {name: [] for name in ("train", "val", "test", "ood")}
    for row in rows:
        if row["domain"] == "oos":
            if row["split"] == f"oos_{out_of_scope}":
                parts["ood"].append(_Row(row["text"], OUT_OF_SCOPE, OUT_OF_SCOPE))
        elif row["domain"] not in away:
            parts[row["split"]].append(_Row(row["text"], row["intent"], row["domain"]))
        elif row["split"] == out_of_scope:
            parts["ood"].append(_Row(row["text"], OUT_OF_SCOPE, row["domain"]))
    parts["ood"].sort(key=lambda row: row.group == OUT_OF_SCOPE)
    intents = sorted({(row.group, row.label) for row in parts["train"]})
    return _texts(
        parts,
        classes=tuple(intent for _, intent in intents),
        groups=(*domains, OUT_OF_SCOPE),
        name="CLINC150",
        source="Larson et al. (2019)",
        min_count=min_count,
        max_length=max_length,
    )


def load_blimp(
    paradigms: str | Sequence[str] = "order",
    held_out: Sequence[str] | None = None,
    full: bool = False,
    min_count: int = 3,
    max_length: int | None = None,
) -> Texts:
    """Pairs of sentences that hardly differ, of which one is good English (BLiMP).

    The label is whether a sentence is acceptable. Rows come in pairs, the good one first: rows 2i and 2i + 1. Of each
    paradigm of 1000 pairs the first 800 are in ``train``, the next 100 in ``val`` and the last 100 in ``test``; all
    of a paradigm that is held out is in ``ood``, with its labels.

    28 of the 67 paradigms ship. In the twelve of kind ``"order"`` both sentences of every pair have the same words, so
    a model that does not see the order gets exactly half of the sentences right. In the sixteen of kind
    ``"agreement"`` one word differs, and which one is right depends on another; of ``"all"``, nine short sentences of
    these are in two parts, because two paradigms share them.

    The whole set is read from the folder that the environment variable ``GPSEQ_DATA`` names: either the published
    files ``blimp/*.jsonl``, or ``blimp.csv.gz`` with the columns ``paradigm, sentence_good, sentence_bad`` and any
    others. Nothing is downloaded.

    Args:
        paradigms: ``"order"``, ``"agreement"``, ``"all"`` of what ships or of the whole set, or names of paradigms.
        held_out: names of paradigms for ``ood``; they leave the other parts. ``None``: if a kind is named, three of
            it (six of ``"all"``) that have relatives in the training set; if names are listed, none.
        full: whether to read the whole set from the folder instead.
        min_count: words rarer than this in ``train`` are ``"<unk>"``. What only one pair has comes twice in it.
        max_length: words at most, signs counted; ``None``: as many as the longest sentence has.

    Returns:
        With ``paradigms="order"``: 14,400, 1800, 1800 and 6000 sentences; groups are the paradigms, first those of
        the training set.

    Raises:
        ValueError: if there is no such paradigm, if none is left to train on, if ``min_count`` or ``max_length`` is
            below 1, or if the folder's file does not hold such a table.
        FileNotFoundError: if ``full`` and the variable is not set, or the folder lacks the files.

    Source:
        Warstadt et al. (2020), BLiMP: the benchmark of linguistic minimal pairs for English.

    Example:
        >>> texts = load_blimp()
        >>> texts.train.texts[:2]
        ('Who should Derek hug after shocking Richard?', 'Who should Derek hug Richard after shocking?')
        >>> texts.train.labels[:2], len(texts.train), len(texts.ood)
        (tensor([1, 0]), 14400, 6000)
    """
    table = _read_blimp(_find_blimp()) if full else _blimp_table(path("blimp_subset.csv.gz"))
    chosen = _names(table if paradigms == "all" else _kind(paradigms), "paradigms", table)
    if held_out is None:
        held_out = [name for name in chosen if name in HELD_OUT] if isinstance(paradigms, str) else []
    away = _names(held_out, "held_out", table)
    stay = [name for name in chosen if name not in away]
    if not stay:
        raise ValueError(f"paradigms: got {', '.join(chosen) or 'none'}, expected one at least that is not held out")
    parts: dict[str, list[_Row]] = {name: [] for name in ("train", "val", "test", "ood")}
    for name in (*stay, *away):
        for number, (good, bad) in enumerate(table[name]):
            tenth = 10 * number // len(table[name])
            part = "ood" if name in away else "train" if tenth < 8 else "val" if tenth < 9 else "test"
            parts[part] += [_Row(good, "acceptable", name), _Row(bad, "unacceptable", name)]
    return _texts(
        parts,
        classes=("unacceptable", "acceptable"),
        groups=(*stay, *away),
        name="BLiMP",
        source="Warstadt et al. (2020)",
        min_count=min_count,
        max_length=max_length,
    )


def load_sentiment(domain: str = "yelp", seed: int = 0, min_count: int = 2, max_length: int | None = None) -> Texts:
    """Sentences of praise or blame from reviews of telephones, films and restaurants (UCI Sentiment).

    One domain is split at random, 70 %, 10 % and 20 % of each class; ``ood`` is the other two, with their labels. A
    sentence that repeats the words of an earlier one of its domain is left out (20 of 3000), so none of ``test`` is in
    ``train``.

    Args:
        domain: where ``train``, ``val`` and ``test`` are from: ``"amazon_cells"``, ``"imdb"`` or ``"yelp"``.
        seed: which split; any integer.
        min_count: words rarer than this in ``train`` are ``"<unk>"``.
        max_length: words at most, signs counted; ``None``: as many as the longest sentence has.

    Returns:
        About 700, 100, 200 and 2000 sentences; groups are the three domains, in alphabetical order.

    Raises:
        ValueError: if there is no such domain, or if ``min_count`` or ``max_length`` is below 1.

    Source:
        Kotzias, Denil, de Freitas and Smyth (2015), From group to individual labels using deep features.

    Example:
        >>> texts = load_sentiment("imdb")
        >>> texts.classes, [len(part) for part in (texts.train, texts.val, texts.test, texts.ood)]
        (('negative', 'positive'), [698, 99, 200, 1983])
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain: got {domain!r}, expected one of {', '.join(DOMAINS)}")
    seen: set[tuple[str, ...]] = set()
    rows: list[_Row] = []
    for row in _table(path("uci_sentiment.csv.gz")):
        words = (row["domain"], *split_words(row["text"]))
        if words not in seen:
            seen.add(words)
            rows.append(_Row(row["text"], ("negative", "positive")[int(row["label"])], row["domain"]))
    parts = {"train": [], "val": [], "test": [], "ood": [row for row in rows if row.group != domain]}
    for label in ("negative", "positive"):
        numbers = [number for number, row in enumerate(rows) if row.group == domain and row.label == label]
        numbers.sort(key=lambda number: row_key(number, seed))
        val, test = round(0.7 * len(numbers)), round(0.8 * len(numbers))
        for part, chosen in (("train", numbers[:val]), ("val", numbers[val:test]), ("test", numbers[test:])):
            parts[part] += [rows[number] for number in sorted(chosen)]
    return _texts(
        parts,
        classes=("negative", "positive"),
        groups=DOMAINS,
        name="UCI Sentiment",
        source="Kotzias et al. (2015), UCI Machine Learning Repository 331",
        min_count=min_count,
        max_length=max_length,
    )


def _texts(
    parts: dict[str, list[_Row]],
    classes: tuple[str, ...],
    groups: tuple[str, ...],
    name: str,
    source: str,
    min_count: int,
    max_length: int | None,
) -> Texts:
    """The parts as ids: one vocabulary, from the training part, and one length of rows."""
    vocabulary = Vocabulary.build([row.text for row in parts["train"]], min_count)
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length: got {max_length}, expected at least 1")
    padded = {part: vocabulary.pad([row.text for row in rows], max_length) for part, rows in parts.items()}
    width = max(ids.shape[1] for ids, _ in padded.values())
    label = {text: number for number, text in enumerate(classes)}
    group = {text: number for number, text in enumerate(groups)}

    def sentences(rows: list[_Row], ids: Tensor, lengths: Tensor) -> Sentences:
        return Sentences(
            texts=tuple(row.text for row in rows),
            ids=functional.pad(ids, (0, width - ids.shape[1]), value=PADDING),
            lengths=lengths,
            labels=torch.tensor([label.get(row.label, -1) for row in rows], dtype=torch.int64),
            groups=torch.tensor([group[row.group] for row in rows], dtype=torch.int64),
        )

    split = {part: sentences(rows, *padded[part]) for part, rows in parts.items()}
    return Texts(**split, vocabulary=vocabulary, classes=classes, groups=groups, name=name, source=source)


def _names(names: Iterable[str], argument: str, known: Iterable[str]) -> list[str]:
    """The names, each once, if all are known."""
    if isinstance(names, str):
        raise ValueError(f"{argument}: got the string {names!r}, expected a list of names")
    chosen, choice = list(dict.fromkeys(names)), list(known)
    for name in chosen:
        if name not in choice:
            raise ValueError(f"{argument}: got {name!r}, expected some of {', '.join(choice)}")
    return chosen


def _kind(paradigms: str | Sequence[str]) -> Sequence[str]:
    if not isinstance(paradigms, str):
        return paradigms
    if paradigms not in KINDS:
        raise ValueError(f"paradigms: got {paradigms!r}, expected 'order', 'agreement', 'all' or a list of names")
    return KINDS[paradigms]


def _table(file: Path) -> list[dict[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


def _find_blimp() -> Path:
    folder = os.environ.get(FOLDER_VARIABLE)
    for found in (Path(folder or "", "blimp.csv.gz"), Path(folder or "", "blimp")) if folder else ():
        if found.is_file() or any(found.glob("*.jsonl")):
            return found
    where = f"there is no blimp.csv.gz and no blimp/*.jsonl in {folder}" if folder else f"{FOLDER_VARIABLE} is not set"
    raise FileNotFoundError(
        f"full: {where}. The whole set, 67 paradigms, is read from the folder that the environment variable "
        f"{FOLDER_VARIABLE} names. Put the folder data of the repository github.com/alexwarstadt/blimp there under "
        "the name blimp, or a table blimp.csv.gz with the columns paradigm, sentence_good, sentence_bad"
    )


def _read_blimp(found: Path) -> dict[str, list[tuple[str, str]]]:
    if found.is_file():
        return _blimp_table(found)
    table: dict[str, list[tuple[str, str]]] = {}
    for file in sorted(found.glob("*.jsonl")):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text") from error
        for line, text in enumerate(lines, start=1):
            try:
                row = json.loads(text)
                name, good, bad = (row[key] for key in ("UID", "sentence_good", "sentence_bad"))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {line}: no pair with UID, sentence_good, sentence_bad") from error
            table.setdefault(str(name), []).append((str(good), str(bad)))
    return table


def _blimp_table(file: Path) -> dict[str, list[tuple[str, str]]]:
    """The pairs of each paradigm, in the order of the file."""
    try:
        rows = _table(file)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: not a readable .csv.gz file") from error
    table: dict[str, list[tuple[str, str]]] = {}
    for number, row in enumerate(rows, start=1):
        missing = [column for column in _BLIMP_COLUMNS if not row.get(column)]
        if missing:
            raise ValueError(f"{file}, row {number}: nothing in column {', '.join(missing)}")
        table.setdefault(row["paradigm"], []).append((row["sentence_good"], row["sentence_bad"]))
    if not table:
        raise ValueError(f"{file}: no rows, expected the columns {', '.join(_BLIMP_COLUMNS)}")
    return table
