"""Texts: the tokenizer, what ships, how it is split, and what is accepted from a folder of one's own."""

import csv
import gzip
import io
import itertools
import json
import re
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpseq import datasets
from gpseq.datasets import text as module
from gpseq.datasets.text import AGREEMENT, HELD_OUT, WORD_ORDER, Vocabulary, split_words

PARTS = ("train", "val", "test", "ood")
LOADERS = {
    "clinc150": datasets.load_clinc150,
    "blimp": datasets.load_blimp,
    "sentiment": datasets.load_sentiment,
}


@pytest.fixture(scope="module")
def loaded():
    return {name: load() for name, load in LOADERS.items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GPSEQ_DATA", str(tmp_path))
    return tmp_path


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \t\n", []),
        ("It's GREAT!!", ["it's", "great", "!", "!"]),
        ("don’t 'quote' it", ["don't", "'", "quote", "'", "it"]),
        ("well-known, 10/10", ["well", "-", "known", ",", "10", "/", "10"]),
        ("Crème brûlée – $5.00", ["crème", "brûlée", "–", "$", "5", ".", "00"]),
    ],
)
def test_words(text, words):
    assert split_words(text) == words


def slow_words(text: str) -> list[str]:
    """Letter by letter."""
    found, word = [], ""
    text = text.lower().replace("’", "'")
    for at, sign in enumerate(text):
        inside = sign == "'" and word and re.match(r"\w", text[at + 1 : at + 2])
        if re.match(r"\w", sign) or inside:
            word += sign
            continue
        if word:
            found.append(word)
            word = ""
        if not re.match(r"\s", sign):
            found.append(sign)
    return [*found, word] if word else found


@given(st.one_of(st.text(), st.text(alphabet="aB'’ .-1\n")))
def test_words_letter_by_letter(text):
    assert split_words(text) == slow_words(text)


@given(st.lists(st.text(alphabet="ab c", max_size=12), max_size=6), st.integers(1, 3), st.randoms())
def test_a_vocabulary_depends_on_counts_only(texts, least, random):
    vocabulary = Vocabulary.build(texts, least)
    counts = Counter(word for text in texts for word in split_words(text))
    assert set(vocabulary.words[2:]) == {word for word, count in counts.items() if count >= least}
    order = [(-counts[word], word) for word in vocabulary.words[2:]]
    assert order == sorted(order) and vocabulary.words[:2] == ("<pad>", "<unk>")
    random.shuffle(texts)
    assert Vocabulary.build(texts, least) == vocabulary and len(vocabulary) == len(order) + 2


@given(st.lists(st.text(alphabet="ab c!", max_size=12), max_size=6), st.one_of(st.none(), st.integers(1, 5)))
def test_rows_hold_the_ids_and_nothing_else(texts, length):
    vocabulary = Vocabulary.build(["a b a", "! ab a"])
    ids, lengths = vocabulary.pad(texts, length)
    rows = [[vocabulary.words.index(w) if w in vocabulary.words else 1 for w in split_words(text)] for text in texts]
    rows = [(row or [1])[:length] for row in rows]
    width = length or max(map(len, rows), default=0)
    assert ids.shape == (len(texts), width) and ids.dtype == lengths.dtype == torch.int64
    assert ids.tolist() == [row + [0] * (width - len(row)) for row in rows]
    assert lengths.tolist() == [len(row) for row in rows]
    for text, row in zip(texts, ids, strict=True):
        known = [word if word in vocabulary.words else "<unk>" for word in split_words(text)] or ["<unk>"]
        assert vocabulary.decode(row) == vocabulary.decode(row.tolist()) == known[:length]


def test_words_of_the_text_never_become_padding():
    """A text that spells the special words is taken apart."""
    vocabulary = Vocabulary.build(["<pad> <unk>"])
    assert vocabulary.words == ("<pad>", "<unk>", "<", ">", "pad", "unk")
    assert vocabulary.encode("<pad>") == [2, 4, 3]


@pytest.mark.parametrize("words", [(), ("<pad>",), ("a", "b"), ("<pad>", "<unk>", "a", "a")])
def test_a_vocabulary_begins_with_the_special_words(words):
    with pytest.raises(ValueError, match="words: got"):
        Vocabulary(words)


def test_lengths_and_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="min_count: got 0"):
        Vocabulary.build(["a"], 0)
    with pytest.raises(ValueError, match="length: got 0"):
        Vocabulary.build(["a"]).pad(["a"], 0)
    for load in LOADERS.values():
        with pytest.raises(ValueError, match="min_count: got 0"):
            load(min_count=0)
        with pytest.raises(ValueError, match="max_length: got 0"):
            load(max_length=0)


# --- all sets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADERS)
def test_ids_belong_to_their_texts(loaded, name):
    texts = loaded[name]
    assert texts.source and texts.name and len(texts) == len(texts.train)
    width = texts.train.ids.shape[1]
    longest = 0
    for part in (getattr(texts, part) for part in PARTS):
        assert part.ids.shape == part.padding_mask.shape == (len(part), width)
        assert part.lengths.shape == part.labels.shape == part.groups.shape == (len(part),)
        assert part.ids.dtype == part.lengths.dtype == part.labels.dtype == part.groups.dtype == torch.int64
        assert torch.equal(part.padding_mask, part.ids == 0) and part.lengths.min() >= 1
        assert torch.equal((~part.padding_mask).sum(1), part.lengths)
        assert part.ids.max() < len(texts.vocabulary)
        assert part.labels.max() < len(texts.classes) and 0 <= part.groups.min() <= part.groups.max() < len(
            texts.groups
        )
        longest = max(longest, part.lengths.max().item())
        for row in range(0, len(part), 97):
            assert part.ids[row, : part.lengths[row]].tolist() == texts.vocabulary.encode(part.texts[row])
    assert longest == width  # nothing is cut off
    assert min(texts.train.labels.min(), texts.val.labels.min(), texts.test.labels.min()) == 0
    assert len(set(texts.classes)) == len(texts.classes) and len(set(texts.groups)) == len(texts.groups)


@pytest.mark.parametrize("name", LOADERS)
def test_the_vocabulary_is_that_of_the_training_part(loaded, name):
    texts = loaded[name]
    assert texts.vocabulary == Vocabulary.build(texts.train.texts, 3 if name == "blimp" else 2)
    for part in PARTS:
        ids = getattr(texts, part).ids
        unknown = (ids == 1).sum() / (ids > 0).sum()
        assert 0 < unknown < (0.35 if part == "ood" else 0.2), part
    assert (LOADERS[name](min_count=1).train.ids != 1).all()


@pytest.mark.parametrize("name", LOADERS)
def test_loading_twice_gives_the_same(loaded, name):
    again = LOADERS[name]()
    assert again.vocabulary == loaded[name].vocabulary
    for part in PARTS:
        one, other = getattr(again, part), getattr(loaded[name], part)
        assert one.texts == other.texts and torch.equal(one.ids, other.ids) and torch.equal(one.labels, other.labels)
    again.train.ids.zero_()
    assert LOADERS[name]().train.ids.any()


@pytest.mark.parametrize("name", LOADERS)
def test_long_sentences_lose_their_end(loaded, name):
    short = LOADERS[name](max_length=4)
    for part in PARTS:
        one, other = getattr(short, part), getattr(loaded[name], part)
        assert torch.equal(one.ids, other.ids[:, :4]) and torch.equal(one.lengths, other.lengths.clamp(max=4))
        assert one.texts == other.texts
    assert LOADERS[name](max_length=200).test.ids.shape[1] == 200


def test_some_of_the_sentences(loaded):
    part = loaded["clinc150"].test
    rows = torch.tensor([5, 0, 5])
    some = part.select(rows)
    assert len(some) == 3 and some.texts == (part.texts[5], part.texts[0], part.texts[5])
    for name in ("ids", "lengths", "labels", "groups"):
        assert torch.equal(getattr(some, name), getattr(part, name)[rows])
    assert torch.equal(some.padding_mask, part.padding_mask[rows])
    assert part.select(part.labels == 3).labels.tolist() == [3] * 30
    assert len(part.select(torch.zeros(len(part), dtype=torch.bool))) == 0


# --- CLINC150 ---------------------------------------------------------------------------------------------------------


def test_clinc_is_balanced(loaded):
    texts = loaded["clinc150"]
    for part, count in (("train", 100), ("val", 20), ("test", 30)):
        assert getattr(texts, part).labels.bincount().tolist() == [count] * 150
    assert texts.ood.labels.tolist() == [-1] * 1000 and texts.ood.groups.tolist() == [10] * 1000
    assert texts.groups[10] == "out of scope" and list(texts.groups[:10]) == sorted(texts.groups[:10])
    # Fifteen intents a domain, one domain after the other.
    assert torch.equal(texts.train.groups, texts.train.labels // 15)
    assert texts.classes[0] == "current_location" and "translate" in texts.classes


def test_clinc_labels_belong_to_their_queries(loaded):
    """Words that nearly only one intent has."""
    texts = loaded["clinc150"]
    for word, intent in [("timezone", "timezone"), ("calories", "calories"), ("spanish", "translate"), ("pto", "pto_")]:
        rows = [row for row, text in enumerate(texts.train.texts) if word in split_words(text)]
        label, count = Counter(texts.train.labels[rows].tolist()).most_common(1)[0]
        assert intent in texts.classes[label] and count > 0.4 * len(rows) > 4, word


def test_clinc_parts_hardly_overlap(loaded):
    texts = loaded["clinc150"]
    train = {tuple(split_words(text)) for text in texts.train.texts}
    repeated = [sum(tuple(split_words(t)) in train for t in getattr(texts, part).texts) for part in PARTS[1:]]
    assert repeated == [4, 4, 0]


@pytest.mark.parametrize(("part", "count"), [("train", 100), ("val", 100), ("test", 1000)])
def test_clinc_out_of_scope_parts(part, count):
    ood = datasets.load_clinc150(out_of_scope=part).ood
    assert len(ood) == count and (ood.labels == -1).all()
    other = {"train": "val", "val": "test", "test": "train"}[part]
    assert not set(datasets.load_clinc150(out_of_scope=other).ood.texts) & set(ood.texts)


def test_clinc_domains_can_be_held_out(loaded):
    whole, texts = loaded["clinc150"], datasets.load_clinc150(held_out=["travel", "banking"])
    assert len(texts.classes) == 120 and len(texts.train) == 12000 and len(texts.ood) == 1000 + 2 * 15 * 30
    away = {whole.groups.index(name) for name in ("travel", "banking")}
    assert texts.groups == whole.groups and not away & set(texts.train.groups.tolist())
    assert set(texts.ood.groups[:900].tolist()) == away and (texts.ood.groups[900:] == 10).all()
    assert (texts.ood.labels == -1).all()
    stay = torch.tensor([group not in away for group in whole.test.groups.tolist()])
    kept = whole.test.select(stay)
    assert texts.test.texts == kept.texts
    names = [texts.classes[label] for label in texts.test.labels.tolist()]
    assert names == [whole.classes[label] for label in kept.labels.tolist()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_of_scope": "all"}, "out_of_scope: got 'all', expected 'train', 'val' or 'test'"),
        ({"held_out": ["bank"]}, "held_out: got 'bank', expected some of auto_and_commute, banking"),
        ({"held_out": ["oos"]}, "held_out: got 'oos'"),
        ({"held_out": "banking"}, "held_out: got the string 'banking', expected a list of names"),
    ],
)
def test_clinc_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        datasets.load_clinc150(**arguments)


def test_one_domain_has_to_stay(loaded):
    with pytest.raises(ValueError, match="held_out: got all 10 domains"):
        datasets.load_clinc150(held_out=loaded["clinc150"].groups[:10])


# --- BLiMP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [1, 2])
def test_word_order_is_all_that_differs(least):
    """So whatever is a function of the bag of words gets half of the sentences right."""
    texts = datasets.load_blimp("order", min_count=least)
    for part in (getattr(texts, part) for part in PARTS):
        good, bad = part.ids[::2], part.ids[1::2]
        assert torch.equal(good.sort(1).values, bad.sort(1).values)
        assert (good != bad).any(1).double().mean() > 0.99  # unknown words may hide the difference
        assert least > 1 or part is not texts.train or (good != bad).any(1).all()
        assert torch.equal(part.lengths[::2], part.lengths[1::2])


@pytest.mark.parametrize("kind", ["order", "agreement", "all"])
def test_blimp_is_balanced_and_pairs_stay_together(kind):
    texts = datasets.load_blimp(kind)
    names = {"order": WORD_ORDER, "agreement": AGREEMENT, "all": (*WORD_ORDER, *AGREEMENT)}[kind]
    away = [name for name in names if name in HELD_OUT]
    assert len(away) == (6 if kind == "all" else 3)
    assert texts.groups == (*(name for name in names if name not in away), *away)
    stay = len(names) - len(away)
    for part, count in (("train", 1600), ("val", 200), ("test", 200)):
        assert getattr(texts, part).groups.bincount().tolist() == [count] * stay
    assert texts.ood.groups.bincount(minlength=len(names)).tolist() == [0] * stay + [2000] * len(away)
    for part in (getattr(texts, part) for part in PARTS):
        assert part.labels.tolist() == [1, 0] * (len(part) // 2)
        assert torch.equal(part.groups[::2], part.groups[1::2])
    assert texts.classes == ("unacceptable", "acceptable")


@pytest.mark.parametrize(("kind", "count"), [("order", 0), ("all", 9)])
def test_hardly_any_sentence_is_in_two_parts(kind, count):
    """None if the word order is all that differs."""
    texts = datasets.load_blimp(kind)
    parts = [set(getattr(texts, part).texts) for part in PARTS]
    assert sum(len(one & other) for one, other in itertools.combinations(parts, 2)) == count


def test_agreement_differs_in_one_word():
    texts = datasets.load_blimp("agreement", min_count=1)
    good, bad = texts.train.texts[::2], texts.train.texts[1::2]
    differences = [
        sum(a != b for a, b in zip(split_words(one), split_words(other), strict=True))
        for one, other in zip(good, bad, strict=True)
        if len(split_words(one)) == len(split_words(other))
    ]
    assert len(differences) > 0.99 * len(good) and set(differences) == {1}


def test_blimp_paradigms_can_be_chosen():
    texts = datasets.load_blimp(["adjunct_island", "only_npi_scope"])
    assert texts.groups == ("adjunct_island", "only_npi_scope") and len(texts.train) == 3200 and len(texts.ood) == 0
    assert texts.ood.ids.shape == (0, texts.train.ids.shape[1]) and texts.ood.padding_mask.shape == texts.ood.ids.shape
    texts = datasets.load_blimp(["adjunct_island"], held_out=["only_npi_scope"])
    assert texts.groups == ("adjunct_island", "only_npi_scope") and len(texts.train) == 1600 and len(texts.ood) == 2000
    texts = datasets.load_blimp("order", held_out=[])
    assert len(texts.ood) == 0 and len(texts.train) == 12 * 1600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paradigms": "island"}, "paradigms: got 'island', expected 'order', 'agreement', 'all' or a list"),
        ({"paradigms": ["wh_island"]}, "paradigms: got 'wh_island', expected some of adjunct_island"),
        ({"paradigms": []}, "paradigms: got none, expected one at least"),
        ({"paradigms": ["adjunct_island"], "held_out": ["adjunct_island"]}, "paradigms: got adjunct_island, expected"),
        ({"held_out": ["wh_island"]}, "held_out: got 'wh_island'"),
        ({"held_out": "only_npi_scope"}, "held_out: got the string 'only_npi_scope'"),
    ],
)
def test_blimp_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        datasets.load_blimp(**arguments)


def pairs(count: int = 20) -> list[dict[str, str]]:
    return [
        {"UID": name, "sentence_good": f"{name} good {i}.", "sentence_bad": f"{name} bad {i}."}
        for name in ("one", "two", "only_npi_scope")
        for i in range(count)
    ]


def write_table(file, rows, columns=("paradigm", "sentence_good", "sentence_bad", "more")) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**row, "paradigm": row["UID"], "more": "1"} for row in rows)
    data = gzip.compress(out.getvalue().encode())
    file.write_bytes(data)
    return data


@pytest.mark.parametrize("form", ["table", "lines"])
def test_the_whole_set_comes_from_the_folder(folder, form):
    if form == "table":
        write_table(folder / "blimp.csv.gz", pairs())
    else:
        (folder / "blimp").mkdir()
        for name in ("one", "two", "only_npi_scope"):
            lines = [json.dumps({**row, "pairID": "0"}) for row in pairs() if row["UID"] == name]
            (folder / "blimp" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = datasets.load_blimp("all", full=True)
    assert set(texts.groups) == {"one", "two", "only_npi_scope"}
    assert [len(getattr(texts, part)) for part in PARTS] == [96, 12, 12, 0]
    texts = datasets.load_blimp(["one"], held_out=["two"], full=True)
    assert texts.train.texts[:3] == ("one good 0.", "one bad 0.", "one good 1.")
    assert [len(getattr(texts, part)) for part in PARTS] == [32, 4, 4, 40]
    assert texts.test.texts[0] == "one good 18."
    assert len(datasets.load_blimp().train) == 14400  # what ships is not touched by the folder
    with pytest.raises(ValueError, match="paradigms: got 'adjunct_island', expected some of one"):
        datasets.load_blimp(full=True)


@pytest.mark.parametrize("variable", [None, "", "folder"])
def test_a_missing_file_is_explained(tmp_path, monkeypatch, variable):
    if variable is None:
        monkeypatch.delenv("GPSEQ_DATA", raising=False)
    else:
        monkeypatch.setenv("GPSEQ_DATA", variable and str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if variable != "folder":
        write_table(tmp_path / "blimp.csv.gz", pairs())  # an empty variable does not mean the working directory
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load_blimp(full=True)
    message = str(caught.value)
    start = f"there is no blimp.csv.gz and no blimp/*.jsonl in {tmp_path}" if variable else "GPSEQ_DATA is not set"
    assert message.startswith(f"full: {start}")
    for word in ("github.com/alexwarstadt/blimp", "GPSEQ_DATA", "paradigm, sentence_good, sentence_bad", "67"):
        assert word in message


def test_tables_of_another_kind_are_refused(folder):
    file = folder / "blimp.csv.gz"
    write_table(file, pairs(), columns=("paradigm", "sentence_good"))
    with pytest.raises(ValueError, match=r"blimp.csv.gz, row 1: nothing in column sentence_bad"):
        datasets.load_blimp("all", full=True)
    write_table(file, [*pairs(), {"UID": "one", "sentence_good": "", "sentence_bad": "x"}])
    with pytest.raises(ValueError, match=r"blimp.csv.gz, row 61: nothing in column sentence_good"):
        datasets.load_blimp("all", full=True)
    write_table(file, [])
    with pytest.raises(ValueError, match=r"blimp.csv.gz: no rows, expected the columns paradigm"):
        datasets.load_blimp("all", full=True)
    file.write_bytes(b"paradigm,sentence_good,sentence_bad\n")
    with pytest.raises(ValueError, match=r"blimp.csv.gz: not a readable .csv.gz file"):
        datasets.load_blimp("all", full=True)


@pytest.mark.parametrize("line", ["{", "[]", '{"UID": "one"}', "3", "null"])
def test_lines_of_another_kind_are_refused(folder, line):
    (folder / "blimp").mkdir()
    (folder / "blimp" / "one.jsonl").write_text(json.dumps(pairs()[0]) + "\n" + line, encoding="utf-8")
    with pytest.raises(ValueError, match=r"one.jsonl, line 2: no pair with UID, sentence_good, sentence_bad"):
        datasets.load_blimp("all", full=True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_table_is_refused_or_read_whole(folder, data):
    file = folder / "blimp.csv.gz"
    content = bytearray(write_table(file, pairs()))
    whole = module._blimp_table(file)
    at = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.integers(0, 255))
    if change:
        content[at] ^= change
    else:
        del content[at:]
    file.write_bytes(content)
    try:
        assert module._blimp_table(file) == whole
    except ValueError as caught:
        assert "blimp.csv.gz" in str(caught)


# --- sentiment --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["amazon_cells", "imdb", "yelp"])
def test_sentiment_is_split_within_a_domain(domain):
    texts = datasets.load_sentiment(domain)
    here = texts.groups.index(domain)
    for part in ("train", "val", "test"):
        assert (getattr(texts, part).groups == here).all()
        assert abs(getattr(texts, part).labels.double().mean() - 0.5) < 0.01
    assert set(texts.ood.groups.tolist()) == {0, 1, 2} - {here} and abs(texts.ood.labels.double().mean() - 0.5) < 0.01
    sizes = [len(getattr(texts, part)) for part in PARTS]
    assert sum(sizes) == 2980 and [round(size, -1) for size in sizes[1:3]] == [100, 200] and sizes[0] > 685
    words = [{tuple(split_words(text)) for text in getattr(texts, part).texts} for part in PARTS[:3]]
    assert [len(part) for part in words] == sizes[:3]
    assert not words[0] & words[1] and not words[0] & words[2] and not words[1] & words[2]


def test_sentiment_labels_belong_to_their_sentences():
    texts = datasets.load_sentiment("yelp")
    for word, label in [("great", 1), ("delicious", 1), ("amazing", 1), ("worst", 0), ("terrible", 0), ("bad", 0)]:
        rows = torch.tensor([word in split_words(text) for text in texts.train.texts])
        assert rows.sum() > 4 and (texts.train.labels[rows] == label).double().mean() > 0.7, word


def test_sentiment_has_many_splits():
    one, other = datasets.load_sentiment(seed=0), datasets.load_sentiment(seed=1)
    assert len(one.train) == len(other.train) and one.train.texts != other.train.texts
    shared = len(set(one.test.texts) & set(other.test.texts)) / len(one.test)
    assert 0.1 < shared < 0.3  # two random fifths
    everything = {text for part in PARTS for text in getattr(one, part).texts}
    assert everything == {text for part in PARTS for text in getattr(other, part).texts}


def test_no_control_characters_are_left(loaded):
    for part in PARTS:
        for text in getattr(loaded["sentiment"], part).texts:
            assert not re.search("[\x00-\x1f\x7f-\x9f]", text)


def test_an_unknown_domain_is_refused():
    with pytest.raises(ValueError, match="domain: got 'books', expected one of amazon_cells, imdb, yelp"):
        datasets.load_sentiment("books")
