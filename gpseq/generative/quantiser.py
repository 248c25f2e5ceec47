"""Vectors as one of K codes, a codebook that follows its encodings, and codes that come back to life."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpseq.checks import check_count, check_floating, check_number

CODEBOOKS = ("ema", "gradient")


@dataclass(frozen=True)
class Codebook:
    """Codes, and how often each was used of late.

    Attributes:
        codes: ``(K, d)``.
        counts: ``(K,)``, moving average of the encodings a batch that fell to each code.
    """

    codes: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Quantised:
    """What the quantiser made of encodings.

    Attributes:
        codes: ``(*batch, d)``, the nearest codes; their gradient goes to the encodings as it is.
        tokens: ``(*batch,)``, int64, which codes these are.
        loss: scalar, what draws encodings to their codes and, with a gradient codebook, codes to their encodings.
    """

    codes: Tensor
    tokens: Tensor
    loss: Tensor


@dataclass(frozen=True)
class CodebookUse:
    """How tokens spread over the codebook.

    Attributes:
        counts: ``(K,)``, tokens of each code.
        used: codes that occur.
        perplexity: exponential of the entropy of the shares: K if all occur equally often, 1 if one alone does.
    """

    counts: Tensor
    used: int
    perplexity: float

    def __str__(self) -> str:
        return f"{self.used} of {len(self.counts)} codes in use, perplexity {self.perplexity:.1f}"


def codebook_use(tokens: Tensor, num_codes: int) -> CodebookUse:
    r"""Count codes, :math:`\text{perplexity} = \exp(-\sum_k p_k \log p_k)`.

    Args:
        tokens: integers from 0 to K - 1, of any shape.
        num_codes: K.

    Returns:
        The counts, on the CPU, and what they say.

    Raises:
        TypeError: tokens that are no integers.
        ValueError: no tokens at all, or some out of range.

    Example:
        >>> print(codebook_use(torch.tensor([[0, 1], [1, 0]]), num_codes=8))
        2 of 8 codes in use, perplexity 2.0
    """
    check_count("num_codes", num_codes)
    check_tokens(tokens, num_codes)
    if not tokens.numel():
        raise ValueError("tokens: expected at least one, got none.")
    counts = torch.bincount(tokens.flatten().cpu(), minlength=num_codes)
    shares = counts.double() / counts.sum()
    return CodebookUse(counts, int(counts.count_nonzero()), float(torch.special.entr(shares).sum().exp()))


def check_tokens(tokens: Any, num_codes: int) -> Tensor:
    """Integers from 0 to K - 1.

    Args:
        tokens: what came.
        num_codes: K.

    Returns:
        The tokens, int64.

    Raises:
        TypeError: they are no integers.
        ValueError: some are out of range.
    """
    if (
        not isinstance(tokens, Tensor)
        or tokens.is_floating_point()
        or tokens.is_complex()
        or tokens.dtype == torch.bool
    ):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens: expected a tensor of integers, got {got}.")
    tokens = tokens.long()
    if tokens.numel():
        low, high = torch.stack(tokens.aminmax()).tolist()
        if low < 0 or high >= num_codes:
            raise ValueError(f"tokens: expected integers from 0 to {num_codes - 1}, got {low} to {high}.")
    return tokens


def nearest_codes(z: Tensor, codes: Tensor) -> Tensor:
    r"""Which code is nearest, :math:`\arg\min_k |z - e_k|^2`; the first of several.

    Args:
        z: ``(*batch, d)``.
        codes: e, ``(K, d)``, of the same dtype.

    Returns:
        ``(*batch,)``, int64.

    Example:
        >>> nearest_codes(torch.tensor([[0.1], [0.9]]), torch.tensor([[0.0], [1.0]]))
        tensor([0, 1])
    """
    # Differences to the mean code: a common offset would otherwise eat the digits of the products. No autocast, for
    # the same reason.
    with torch.autocast(z.device.type, enabled=False):
        centre = codes.mean(0)
        z, codes = z - centre, codes - centre
        return (0.5 * codes.square().sum(-1) - z @ codes.mT).argmin(-1)


def averaged(book: Codebook, z: Tensor, tokens: Tensor, decay: float, move: bool = True) -> Codebook:
    r"""The codebook after a batch, by exponential moving averages.

    .. math::
        N_k \leftarrow \gamma N_k + (1 - \gamma) n_k, \qquad
        e_k \leftarrow e_k + \frac{1 - \gamma}{N_k} \sum_{i: k_i = k} (z_i - e_k)

    with :math:`n_k` encodings of the batch at code k. This is the mean of all encodings that ever fell to k, with
    weights that decay; a code without any stays where it is.

    Args:
        book: before.
        z: ``(n, d)``.
        tokens: ``(n,)``.
        decay: :math:`\gamma`.
        move: whether codes move too, or counts alone change.

    Returns:
        A new codebook.

    Source:
        van den Oord, Vinyals and Kavukcuoglu (2017), Neural discrete representation learning, appendix A.1.
    """
    # A product with ones and zeros is as fast as scattered sums here, and adds in the same order on every device.
    member = functional.one_hot(tokens, len(book.codes)).to(z.dtype)
    number = member.sum(0)
    counts = decay * book.counts + (1 - decay) * number
    if not move:
        return Codebook(book.codes, counts)
    shift = member.mT @ z - number.unsqueeze(-1) * book.codes
    smallest = torch.finfo(counts.dtype).tiny
    return Codebook(book.codes + (1 - decay) * shift / counts.clamp(min=smallest).unsqueeze(-1), counts)


def revived(book: Codebook, z: Tensor, below: float, generator: torch.Generator | None = None) -> Codebook:
    """Codes that are hardly used start anew, each at an encoding of the batch; they then count as used on average.

    Args:
        book: before.
        z: encodings of now, ``(n, d)``.
        below: a code is dead if its count is smaller than this part of the mean count.
        generator: of the choice of encodings, no one twice as long as there are enough.

    Returns:
        A new codebook. Draws are made whether or not there are dead codes: to know would be to wait for the device.
    """
    mean = book.counts.mean()
    dead = book.counts < below * mean
    chosen = _choose(len(z), len(book.codes), z.device, generator)
    return Codebook(
        torch.where(dead.unsqueeze(-1), z[chosen], book.codes),
        torch.where(dead, mean, book.counts),
    )


class VectorQuantiser(nn.Module):
    r"""Replace each encoding by the nearest of K codes, with a gradient as if nothing had happened.

    .. math::
        k = \arg\min_j |z - e_j|^2, \qquad \hat z = z + \operatorname{sg}(e_k - z), \qquad
        \text{loss} = \beta\, |z - \operatorname{sg}(e_k)|^2 \;[\, + |\operatorname{sg}(z) - e_k|^2 \,],

    sg the identity without gradient, and squares as means over all numbers. The term in brackets is for a codebook
    that learns by gradient; the other kind follows its encodings by moving averages. Both count how
    often codes are used, and bring those back to life that hardly are.

    The codebook starts at encodings of the first batch in training mode, unless :meth:`initialise` was called before.
    It changes in training mode only. Averages are those of one process.

    Args:
        num_codes: K.
        dim: d, of encodings and codes.
        codebook: ``"ema"`` or ``"gradient"``.
        decay: :math:`\gamma`, of the averages, in [0, 1).
        beta: :math:`\beta`.
        revive_below: a code is dead if its count is smaller than this part of the mean count, in [0, 1); 0 lets the
            dead rest. With a decay of .98 a code that is never used is dead after 150 steps at .05.
        device: of the codebook.
        dtype: of the codebook.

    Attributes:
        codes: ``(K, d)``, a parameter if it learns by gradient, and otherwise a buffer.
        counts: ``(K,)``, moving average of the encodings a batch that fell to each code.

    Raises:
        ValueError: numbers out of their range.

    Source:
        van den Oord, Vinyals and Kavukcuoglu (2017), Neural discrete representation learning, section 3.2 and
        appendix A.1; Dhariwal et al. (2020), Jukebox, section 3.1, for codes that come back.

    Example:
        >>> quantiser = VectorQuantiser(num_codes=4, dim=2)
        >>> out = quantiser(torch.randn(3, 5, 2))
        >>> out.codes.shape, out.tokens.shape
        (torch.Size([3, 5, 2]), torch.Size([3, 5]))
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        codebook: Literal["ema", "gradient"] = "ema",
        decay: float = 0.98,
        beta: float = 0.25,
        revive_below: float = 0.05,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_codes", num_codes)
        check_count("dim", dim)
        if codebook not in CODEBOOKS:
            raise ValueError(f"codebook: expected one of {', '.join(CODEBOOKS)}, got {codebook!r}.")
        for name, value in (("decay", decay), ("revive_below", revive_below)):
            if not 0 <= check_number(name, value, expected="a number in [0, 1)") < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}.")
        if check_number("beta", beta) < 0:
            raise ValueError(f"beta: expected a number that is not negative, got {beta!r}.")
        self.num_codes, self.dim, self.codebook = num_codes, dim, codebook
        self.decay, self.beta, self.revive_below = float(decay), float(beta), float(revive_below)
        codes = torch.randn(num_codes, dim, device=device, dtype=dtype) / math.sqrt(dim)
        self.codes: Tensor
        if codebook == "gradient":
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)
        self.counts: Tensor
        self.register_buffer("counts", torch.ones(num_codes, device=device, dtype=dtype))
        self.initialised: Tensor
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool, device=device))
        # What the buffer says, read once: to ask it at every step would be to wait for the device.
        self._is_initialised: bool | None = False

    @property
    def is_initialised(self) -> bool:
        """Whether the codes have started at data."""
        if self._is_initialised is None:
            self._is_initialised = bool(self.initialised)
        return self._is_initialised

    @torch.no_grad()
    def initialise(self, z: Tensor, generator: torch.Generator | None = None) -> None:
        """Start the codes at encodings, chosen without repeats.

        Args:
            z: ``(*batch, d)``, at least K of them.
            generator: of the choice; ``None`` is torch's default.

        Raises:
            TypeError: encodings that are not floating.
            ValueError: another width, or fewer encodings than codes. The codebook is as it was.
        """
        flat = self._flat(z)
        if len(flat) < self.num_codes:
            raise ValueError(
                f"num_codes: the codebook of {self.num_codes} codes is larger than the data to start from, "
                f"{len(flat)} encodings; give more of them, or make the codebook smaller."
            )
        chosen = _choose(len(flat), self.num_codes, flat.device, generator)
        self._replace(Codebook(flat[chosen], torch.full_like(self.counts, len(flat) / self.num_codes)))
        self.initialised.fill_(True)
        self._is_initialised = True

    def forward(self, z: Tensor, generator: torch.Generator | None = None) -> Quantised:
        """Quantise encodings; in training mode the codebook learns from them.

        Args:
            z: ``(*batch, d)``.
            generator: of the choice of encodings at which codes start; ``None`` is torch's default.

        Returns:
            Codes, tokens and the loss.

        Raises:
            TypeError: encodings that are not floating.
            ValueError: another width, or a first batch with fewer encodings than codes.
        """
        flat = self._flat(z)
        still = flat.detach()
        if self.training and not self.is_initialised:
            self.initialise(still, generator)
        tokens = nearest_codes(still, self.codes.detach())
        codes = functional.embedding(tokens, self.codes)
        loss = self.beta * _mean_square(flat - codes.detach())
        if self.codebook == "gradient":
            loss = loss + _mean_square(codes - still)
        if self.training and len(flat):
            self._learn(still, tokens, generator)
        straight = flat + (codes - flat).detach()
        return Quantised(straight.view(z.shape).to(z.dtype), tokens.view(z.shape[:-1]), loss)

    def tokens(self, z: Tensor) -> Tensor:
        """The nearest code of each encoding; nothing is learned.

        Args:
            z: ``(*batch, d)``.

        Returns:
            ``(*batch,)``, int64.

        Raises:
            TypeError: encodings that are not floating.
            ValueError: another width.
        """
        return nearest_codes(self._flat(z).detach(), self.codes.detach()).view(z.shape[:-1])

    def lookup(self, tokens: Tensor) -> Tensor:
        """The codes of tokens.

        Args:
            tokens: ``(*batch,)``, integers from 0 to K - 1.

        Returns:
            ``(*batch, d)``.

        Raises:
            TypeError: tokens that are no integers.
            ValueError: some are out of range.
        """
        return functional.embedding(check_tokens(tokens, self.num_codes), self.codes)

    @torch.no_grad()
    def _learn(self, z: Tensor, tokens: Tensor, generator: torch.Generator | None) -> None:
        book = Codebook(self.codes.detach(), self.counts)
        book = averaged(book, z, tokens, self.decay, move=self.codebook == "ema")
        if self.revive_below:
            book = revived(book, z, self.revive_below, generator)
        self._replace(book)

    def _replace(self, book: Codebook) -> None:
        self.codes.copy_(book.codes)
        self.counts.copy_(book.counts)

    def _flat(self, z: Tensor) -> Tensor:
        check_floating("z", z)
        if not z.dim() or z.shape[-1] != self.dim:
            raise ValueError(f"z: expected encodings (*batch, {self.dim}), got shape {tuple(z.shape)}.")
        return z.reshape(-1, self.dim).to(self.codes.dtype)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_initialised = None

    def extra_repr(self) -> str:
        """What the quantiser was made with."""
        return f"{self.num_codes}, {self.dim}, codebook={self.codebook!r}, decay={self.decay}, beta={self.beta}"


def _choose(number: int, count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """So many places below ``number``, without repeats as long as there are enough."""
    drawn = torch.randperm(max(number, count), generator=generator, device=generator.device if generator else device)
    return drawn[:count].to(device) % number


def _mean_square(error: Tensor) -> Tensor:
    """Zero where there is nothing, not NaN."""
    return error.square().sum() / max(error.numel(), 1)
