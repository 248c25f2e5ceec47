"""The walk of a state through a network: which rule is next, and where weights add noise."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpseq.checks import stacklevel_outside
from gpseq.propagation.activations import activation_moments
from gpseq.propagation.draws import Draws
from gpseq.propagation.entries import Entries, entry_noise
from gpseq.propagation.laws import Law
from gpseq.propagation.moments import Blocks, Covariance, Diagonal, Full, GaussianState, LinearMap, LowRank
from gpseq.propagation.noise import block_noise, column_noise, diagonal_noise, full_noise, second_order
from gpseq.propagation.posteriors import BoundPosterior
from gpseq.propagation.registry import find

#: Arguments that choose from the outputs, which rules know and modules need not.
_SELECTIONS = {"positions", "outputs"}


@dataclass(frozen=True)
class Options:
    """How moments are carried.

    Attributes:
        form: of the covariance, one of ``FORMS``.
        activations: ``"moments"`` or ``"tangent"``.
        layer_norm: ``"jacobian"``, or ``"frozen"``: a token's mean and deviation are constants.
        scores: ``"jacobian"``, or ``"frozen"``: the weights of attention are constants.
        values: ``"shared"``, or ``"independent"``: each token has value weights of its own, in the form ``"diag"``.
        products: whether the variance of inputs meets that of weights.
        rescale: whether the columns of a low rank have exact marginals where noise comes in.
        on_unknown: ``"raise"`` or ``"linearise"``.
        dropout: ``"off"``, or ``"variance"``: dropout is a source of variance.
    """

    form: str = "full"
    activations: str = "moments"
    layer_norm: str = "jacobian"
    scores: str = "jacobian"
    values: str = "shared"
    products: bool = True
    rescale: bool = True
    on_unknown: str = "raise"
    dropout: str = "off"


class Walk:
    """Carries a state through modules, and is handed to their rules.

    Args:
        model: whose submodules have names in messages.
        posterior: of its weights.
        options: see there.
        num_draws: R, columns that are drawn in the form ``"lowrank"``.
        generator: of the draws.
        lead: name of the model's argument that the state is, where it is not its first.
        batch_dim: where modules have the batch, which states have first.
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: BoundPosterior,
        options: Options,
        num_draws: int = 64,
        generator: torch.Generator | None = None,
        lead: str | None = None,
        batch_dim: int = 0,
    ) -> None:
        self.posterior, self.options, self.num_draws = posterior, options, num_draws
        self.generator, self.lead, self._model = generator, lead, model
        self.batch_dim = self._batch_dim = batch_dim
        self._normals: dict[tuple[Any, ...], Tensor] = {}
        self._asked: Counter[tuple[Any, ...]] = Counter()
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._used: Counter[str] = Counter()
        self._drawn: dict[str, Draws] = {}
        self._exact: dict[str, Tensor] = {}
        if options.form != "lowrank" and posterior.crosses_layers(model):
            warnings.warn(
                f"posterior: covariances between layers are left out in the form {options.form!r}; "
                "covariance='lowrank' keeps them.",
                stacklevel=stacklevel_outside(),
            )
        if options.form == "lowrank" and posterior.posterior.names:
            like = next(iter(posterior.parameters.values()))
            self._drawn, self._exact = posterior.draw(num_draws, generator, like)

    def restarted(self) -> Walk:
        """The same walk, with the same draws, from the beginning."""
        self._used.clear()
        self._asked.clear()
        self.batch_dim = self._batch_dim
        return self

    # Modules

    def __call__(self, module: nn.Module, state: GaussianState, *args: Any, **inputs: Any) -> GaussianState:
        """The state after a module.

        Args:
            module: any.
            state: before it.
            args: further arguments of the module's call.
            inputs: likewise.

        Raises:
            NotImplementedError: there is no rule for it.
        """
        if state.is_certain and self.is_plain(module) and not _SELECTIONS & inputs.keys():
            plain = [arg.mean if isinstance(arg, GaussianState) else arg for arg in args]
            lead = self.leading_argument(module)
            if isinstance(lead, str):
                return GaussianState(_only(self.run(module, **{lead: state.mean}, **inputs)))
            return GaussianState(_only(self.run(module, state.mean, *plain, **inputs)))
        rule = find(module)
        if rule is None:
            return self.unknown(module, state, *args, **inputs)
        return rule(module, state, self, *args, **inputs)

    def leading_argument(self, module: nn.Module) -> int | str:
        """Which argument of a module's call the state is: the first, or one of the model that has a name."""
        return self.lead if self.lead is not None and module is self._model else 0

    def run(self, module: nn.Module, *args: Any, **inputs: Any) -> Any:
        """A module's own output, at the posterior's means."""
        means = self.posterior.means(module)
        return torch.func.functional_call(module, means, args, inputs) if means else module(*args, **inputs)

    def is_uncertain(self, module: nn.Module) -> bool:
        """Whether the posterior covers a parameter of a module."""
        return bool(self.posterior.uncertain(module))

    def is_plain(self, module: nn.Module) -> bool:
        """Whether a module that gets what is certain can run as it is: it has no variance of its own to add."""
        return self.is_silent(module) and not is_time_first(module)

    def is_silent(self, module: nn.Module) -> bool:
        """Whether a module has no variance of its own to add."""
        return not (self.is_uncertain(module) or self._drops(module) or is_source(module))

    def _drops(self, module: nn.Module) -> bool:
        """Whether dropout in a module is a source of variance."""
        if self.options.dropout != "variance":
            return False
        for part in module.modules():
            name = "p" if isinstance(part, nn.modules.dropout._DropoutNd) else "attention_dropout"
            # Attention has it as a number.
            rate = getattr(part, "dropout" if isinstance(part, nn.MultiheadAttention) else name, 0.0)
            if isinstance(rate, float) and rate > 0:
                return True
        return False

    def path(self, module: nn.Module) -> str:
        """The name of a module in the model, for messages."""
        return self._paths.get(id(module)) or "the model itself"

    def unknown(self, module: nn.Module, state: GaussianState, *args: Any, **inputs: Any) -> GaussianState:
        """The state after a module without a rule, or with one that does not know this case.

        Its forward is followed, if that consists of what has rules; if not, it is linearised where the options say so.

        Raises:
            NotImplementedError: it cannot be followed, and unknown modules are not linearised.
        """
        from gpseq.propagation.following import follow
        from gpseq.propagation.tracing import CannotFollow

        before, asked, batch_dim = self._used.copy(), self._asked.copy(), self.batch_dim
        try:
            return follow(module, state, self, *args, **inputs)
        except NotImplementedError as error:
            self._used, self._asked, self.batch_dim = before, asked, batch_dim
            if self.options.on_unknown == "raise":
                if not isinstance(error, CannotFollow):  # something inside says itself what it lacks
                    raise
                raise NotImplementedError(
                    f"model: there is no rule for {self.path(module)}, a {type(module).__name__}, and its forward "
                    f"cannot be followed: {error}; write a rule with gpseq.propagation.register, or take "
                    "on_unknown='linearise'."
                ) from error
        from gpseq.propagation.fallback import linearise

        return linearise(module, state, self, *args, **inputs)

    def unused(self, module: nn.Module | None = None) -> tuple[str, ...]:
        """Names of uncertain parameters that no rule has asked for.

        Args:
            module: those inside of it; ``None`` is all that the posterior has.
        """
        names = self.posterior.posterior.names if module is None else self.posterior.uncertain(module)
        return tuple(name for name in names if name not in self._used)

    # Parameters

    def mean(self, parameter: Tensor | None) -> Tensor | None:
        """The posterior's mean of a parameter."""
        return None if parameter is None else self.posterior.mean(parameter)

    def use(self, *parameters: Tensor | None) -> None:
        """Note that the noise of parameters has been carried on.

        Raises:
            NotImplementedError: a parameter is used twice, and the form cannot say so.
        """
        for parameter in parameters:
            name = self.posterior.name(parameter)
            if name is None:
                continue
            self._used[name] += 1
            if self._used[name] > 1 and self.options.form != "lowrank":
                raise NotImplementedError(
                    f"posterior: {name} is uncertain and used more than once, which the form {self.options.form!r} "
                    "cannot follow; take covariance='lowrank'."
                )

    # What rules are made of

    def linear(
        self,
        state: GaussianState,
        weight: Tensor,
        bias: Tensor | None = None,
        transposed: bool = False,
    ) -> GaussianState:
        r"""A matrix of weights for the last dimension of the state, :math:`h = W a + b`.

        Args:
            state: ``(B, *tokens, D)``.
            weight: the parameter, ``(K, D)``; what has more dimensions is flattened behind the first.
            bias: the parameter, ``(K,)``.
            transposed: the weight is ``(D, K)``.
        """
        return self.linears(state, [(weight, bias)], transposed)

    def linears(
        self, state: GaussianState, layers: Sequence[tuple[Tensor, Tensor | None]], transposed: bool = False
    ) -> GaussianState:
        """Several matrices side by side: their outputs one after the other, with the covariance between them.

        Args:
            state: ``(B, *tokens, D)``.
            layers: weight and bias of each.
            transposed: weights are ``(D, K)``.
        """
        weights = [self.matrix(weight, transposed) for weight, _ in layers]
        mean = torch.cat(
            [_affine(state.mean, w, self.mean(bias)) for w, (_, bias) in zip(weights, layers, strict=True)], -1
        )
        matrix = weights[0] if len(weights) == 1 else torch.cat(weights)
        linear = LinearMap(push=lambda u: u @ matrix.mT, squared=lambda v: v @ matrix.square().mT)
        carried = state.apply(mean, linear)
        if self.options.form == "lowrank":
            return self._with_columns(carried, state, layers, [len(w) for w in weights], transposed)
        noises: list[Covariance | None] = [self._noise(state, weight, bias, transposed) for weight, bias in layers]
        if all(noise is None for noise in noises):
            return carried
        noise = _side_by_side(noises, [len(w) for w in weights], mean)
        if carried.covariance is None:
            return GaussianState(mean, noise)
        return GaussianState(mean, carried.covariance.plus(noise))

    def _with_columns(
        self,
        carried: GaussianState,
        state: GaussianState,
        layers: Sequence[tuple[Tensor, Tensor | None]],
        widths: Sequence[int],
        transposed: bool,
    ) -> GaussianState:
        """What came through layers side by side, with columns of their weights' noise."""
        before = carried.covariance
        assert before is None or isinstance(before, LowRank)
        parts: list[Tensor] = []
        seconds: list[Tensor | None] = []
        some = False
        pieces = [None] * len(layers) if before is None else before.columns.split(list(widths), -1)
        for (weight, bias), piece, width in zip(layers, pieces, widths, strict=True):
            laws = self.laws(weight, bias, state.mean, transposed)
            some = some or bool(laws)
            seconds.append(second_order(laws, state) if self.options.products else None)
            if laws:
                parts.append(self._columns(laws, state, weight, bias, transposed, piece))
            elif piece is not None:
                parts.append(piece)
            else:
                number = self.posterior.posterior.num_columns + self.num_draws
                parts.append(state.mean.new_zeros(number, *state.mean.shape[:-1], width))
        if not some:
            return carried
        columns = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        entries = None if before is None else before.entries
        if any(second is not None for second in seconds):
            like = carried.mean.split(list(widths), -1)
            added = [torch.zeros_like(a) if b is None else b for a, b in zip(like, seconds, strict=True)]
            entries = torch.cat(added, -1) if entries is None else entries + torch.cat(added, -1)
        return GaussianState(carried.mean, LowRank(columns, entries))

    def _columns(
        self,
        laws: Sequence[tuple[Law, str]],
        state: GaussianState,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        onto: Tensor | None = None,
    ) -> Tensor:
        """Columns of the noise of a layer, added to others."""
        drawn, exact = [], []
        for parameter, part in ((weight, "weight"), (bias, "bias")):
            if parameter is not None and self.posterior.name(parameter) is not None:
                turn = transposed and part == "weight"
                draws, known = self.draws(parameter)
                drawn.append((draws.transposed() if turn else draws, part))
                if known is not None:
                    exact.append((known.mT if turn else known, part))
        number, options = self.posterior.posterior.num_columns, self.options
        return column_noise(laws, state, drawn, exact, number, options.rescale, onto)

    def matrix(self, weight: Tensor, transposed: bool = False) -> Tensor:
        """The posterior's mean of a weight as a matrix ``(K, D)``; what has more dimensions is flattened."""
        mean = self.posterior.mean(weight)
        return mean.mT if transposed else mean.flatten(1)

    def laws(
        self, weight: Tensor | None, bias: Tensor | None, like: Tensor, transposed: bool = False
    ) -> list[tuple[Law, str]]:
        """Laws of a layer's noise, each with what it multiplies; the use of the parameters is noted."""
        self.use(weight, bias)
        return self.posterior.law(weight, bias, like, transposed)

    def _noise(self, state: GaussianState, weight: Tensor, bias: Tensor | None, transposed: bool) -> Covariance | None:
        laws = self.laws(weight, bias, state.mean, transposed)
        if not laws:
            return None
        form, products = self.options.form, self.options.products
        if form == "diag":
            return Diagonal(diagonal_noise(laws, state, products))
        if form == "blockdiag":
            return Blocks(block_noise(laws, state, products))
        assert form == "full"
        return Full(full_noise(laws, state, products), (*state.mean.shape[1:-1], laws[0][0].shape[0]))

    def independent(self, state: GaussianState, variance: Tensor) -> GaussianState:
        """The state with independent noise of its entries added, which all that comes after has in common.

        Args:
            state: ``(B, *event)``.
            variance: of the noise, the same.
        """
        noise = self.diagonal(variance)
        return GaussianState(state.mean, noise if state.covariance is None else state.covariance.plus(noise))

    def diagonal(self, variance: Tensor) -> Covariance:
        """Independent entries with some variances, ``(B, *event)``, as a covariance in the form of the walk.

        Columns of the form ``"lowrank"`` are draws with exact marginals: layers behind mix the entries, and what they
        make of them covaries, which a diagonal would forget.
        """
        form = self.options.form
        if form == "diag":
            return Diagonal(variance)
        if form == "blockdiag":
            return Blocks(torch.diag_embed(variance))
        if form == "full":
            return Full(torch.diag_embed(variance.flatten(1)), tuple(variance.shape[1:]))
        drawn = self.normals(self._model, (self.num_draws, *variance.shape[1:]), variance)
        size = drawn.square().sum(0) if self.options.rescale else drawn.new_tensor(float(self.num_draws))
        columns = (drawn * size.rsqrt()).unsqueeze(1) * variance.sqrt()
        number = self.posterior.posterior.num_columns
        if number:
            columns = torch.cat([columns.new_zeros(number, *columns.shape[1:]), columns])
        return LowRank(columns)

    def entries(self, parameter: Tensor, places: Tensor, batch: int | None = None) -> GaussianState:
        r"""Entries of a parameter as a state, :math:`\theta_p`: rows of a table, tokens that are learnt.

        An entry that is at several places of the event has one noise for all of them.

        Args:
            parameter: of any shape.
            places: which entry is where, counted row by row, ``(B, *event)``; or ``(1, *event)`` with a batch.
            batch: B, where that is the same for all of it.
        """
        mean = self.posterior.mean(parameter).flatten()[places]
        state = GaussianState(mean.expand(len(places) if batch is None else batch, *places.shape[1:]))
        return self._with_entries(state, None, None, None, parameter, places)

    def affine(
        self,
        state: GaussianState,
        weight: Tensor | None,
        bias: Tensor | None = None,
        shape: Sequence[int] | None = None,
        offset: float = 0.0,
    ) -> GaussianState:
        r"""Elementwise :math:`\gamma x + \beta`, whose parameters may be uncertain: norms, scales of layers.

        Their noise, of variance :math:`s_\gamma (\mathrm E[x]^2 + \operatorname{Var} x) + s_\beta`, is the same for all
        tokens.

        Args:
            state: ``(B, *event)``.
            weight: gamma, the parameter; ``None`` is one.
            bias: beta, the parameter; ``None`` is zero.
            shape: in which both broadcast with events; ``None`` is their own.
            offset: a number that is added to gamma.
        """
        out, event, scales, shifts = state, state.event, None, None
        if weight is not None:
            scales = _places(weight, None, shape, event)
            gain = self.posterior.mean(weight).flatten()[scales] + offset
            out = out.scale(gain.expand_as(state.mean))
        if bias is not None:
            shifts = _places(bias, None, shape, event)
            out = out.shift(self.posterior.mean(bias).flatten()[shifts])
        return self._with_entries(out, weight, scales, state, bias, shifts)

    def add_parameter(
        self, state: GaussianState, parameter: Tensor, index: Any = None, shape: Sequence[int] | None = None
    ) -> GaussianState:
        r"""A parameter, or some entries of it, added to a state, :math:`x + \theta`: tables of positions.

        Args:
            state: ``(B, *event)``.
            parameter: of any shape.
            index: what is added, ``parameter[index]``; ``None`` is all of it.
            shape: in which that is added, which broadcasts to events or, with a batch, to the state; ``None`` is its
                own.
        """
        places = _places(parameter, index, shape, state.event)
        out = state.shift(self.posterior.mean(parameter).flatten()[places])
        return self._with_entries(out, None, None, None, parameter, places)

    def _with_entries(
        self,
        out: GaussianState,
        weight: Tensor | None,
        scales: Tensor | None,
        factor: GaussianState | None,
        bias: Tensor | None,
        shifts: Tensor | None,
    ) -> GaussianState:
        """A state with the noise of entries of a gain, at some places, and of an offset."""
        laws = self.laws(weight, bias, out.mean)
        if not laws:
            return out
        form, gains, offsets = self.options.form, None, None
        drawn: list[Tensor] = []
        if factor is not None and scales is not None:
            gains = Entries(scales, factor.mean, factor.covariance if self.options.products else None)
        if shifts is not None:
            offsets = Entries(shifts)
        if form == "lowrank":
            for parameter, part in ((weight, gains), (bias, offsets)):
                if part is not None and parameter is not None and self.posterior.name(parameter) is not None:
                    one = self.columns(parameter, part.places)
                    drawn.append(one if part.factor is None else one * part.factor)
        columns = sum(drawn[1:], drawn[0]) if drawn else None
        num_exact = self.posterior.posterior.num_columns
        batch = len(out.mean)
        noise = entry_noise(form, laws, gains, offsets, columns, num_exact, self.options.rescale, batch)
        return out.plus(GaussianState(torch.zeros_like(out.mean), noise))

    def draws(self, parameter: Tensor) -> tuple[Draws, Tensor | None]:
        """Draws of a parameter as a matrix, and its columns that are exact, ``(num_columns, K, D)``; ``"lowrank"``.

        Args:
            parameter: one that is uncertain.
        """
        name = self.posterior.name(parameter)
        assert name is not None
        return self._drawn[name], self._exact.get(name)

    def columns(self, parameter: Tensor, places: Tensor | None = None) -> Tensor:
        """Draws of a parameter, those columns first that are exact; form ``"lowrank"``.

        Args:
            parameter: of any shape, which has n entries.
            places: of some of them, counted row by row; ``None`` is all.

        Returns:
            ``(R, *places)``, or ``(R, n)``.
        """
        draws, exact = self.draws(parameter)
        drawn = draws.dense().flatten(1) if places is None else draws.at(places)
        number = self.posterior.posterior.num_columns
        if not number:
            return drawn
        if exact is None:
            exact = drawn.new_zeros(number, *drawn.shape[1:])
        else:
            exact = exact.flatten(1) if places is None else exact.flatten(1)[:, places]
        return torch.cat([exact, drawn])

    def normals(self, owner: nn.Module, shape: Sequence[int], like: Tensor) -> Tensor:
        """Independent draws from N(0, 1), once for all parts of a batch: no prediction depends on their size.

        Args:
            owner: the module that they are for.
            shape: of the draws, without the batch.
            like: gives dtype and device.
        """
        key: tuple[Any, ...] = (self.path(owner), tuple(shape), like.dtype)
        self._asked[key] += 1  # a module that is called twice draws twice
        key = (*key, self._asked[key])
        if key not in self._normals:
            drawn = torch.randn(*shape, generator=self.generator, dtype=like.dtype, device=like.device)
            self._normals[key] = drawn
        return self._normals[key]

    def elementwise(self, state: GaussianState, function: str | Callable[[Tensor], Tensor]) -> GaussianState:
        """An elementwise function of the state.

        Args:
            state: before it.
            function: the name of an activation, or any elementwise function of tensors.
        """
        found = activation_moments(function, state.mean, state.variance, method=self.options.activations)
        return state.scale(found.gain, found.mean, found.remainder)


def _places(parameter: Tensor, index: Any, shape: Sequence[int] | None, event: Sequence[int]) -> Tensor:
    """Which entry of a parameter is where in an event, ``(1, *event)`` where that is the same for all of a batch."""
    chosen = torch.arange(parameter.numel(), device=parameter.device).view(parameter.shape)
    chosen = chosen if index is None else chosen[index]
    chosen = chosen if shape is None else chosen.reshape(tuple(shape))
    return chosen.expand(len(chosen) if chosen.dim() > len(event) else 1, *event)


def _only(output: Any) -> Tensor:
    """What a plain module says first; of the outputs of transformers, the logits where there are some."""
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values())))
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def is_source(module: nn.Module) -> bool:
    """Whether something inside is a source of variance by itself: it knows its moments, or draws."""
    return any(
        callable(getattr(part, "conditional", None))
        or callable(getattr(part, "propagate_moments", None))
        or isinstance(getattr(part, "sampling", None), str)
        for part in module.modules()
    )


def is_time_first(module: nn.Module) -> bool:
    """Whether a module would take the batch, which states have first, for the time."""
    return any(getattr(part, "batch_first", True) is False for part in module.modules())


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(x, weight, bias)


def _side_by_side(parts: Sequence[Covariance | None], widths: Sequence[int], mean: Tensor) -> Covariance:
    """Independent noise of several layers as that of their outputs, one after the other."""
    if len(parts) == 1:
        assert parts[0] is not None
        return parts[0]
    total: Covariance | None = None
    for number, part in enumerate(parts):
        if part is None:
            continue
        padding = (sum(widths[:number]), sum(widths[number + 1 :]))
        wide = part.apply(
            LinearMap(
                push=lambda u, p=padding: nn.functional.pad(u, p),  # type: ignore[misc]
                squared=lambda v, p=padding: nn.functional.pad(v, p),  # type: ignore[misc]
            )
        )
        total = wide if total is None else total.plus(wide)
    assert total is not None
    return total
