"""Recipes of training: gradient accumulation, mixed precision, compilation, fully sharded backbones."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import gpytorch
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import gpseq
from gpseq.nn import kl_divergence
from tests import fsdp_worker as worker

#: Training sequences: so few that the divergence weighs as much as the labels.
NUM_DATA = 10


class Rows(TorchFunctionMode):
    """Gives a micro-batch the rows of the noise that the whole batch would draw."""

    def __init__(self, rows: Sequence[int], of: int) -> None:
        super().__init__()
        self.rows, self.of, self.draws = list(rows), of, 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.randn:
            return func(*args, **kwargs)
        shape = args if isinstance(args[0], int) else args[0]
        assert shape[0] == len(self.rows), "noise whose first axis is not the batch"
        self.draws += 1
        return func((self.of, *shape[1:]), **kwargs)[self.rows]


class Case:
    """A model, and its loss of a micro-batch as a part of a batch, scaled as the guide says."""

    draws = False

    def __init__(self, model: nn.Module) -> None:
        # Away from the start, where the divergence of the inducing keys has no gradient.
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        self.model = model.train()

    def loss(self, x: Tensor, y: Tensor, size: int) -> Tensor:
        raise NotImplementedError

    def gradients(self, parts: Iterable[Sequence[int]], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.model.zero_grad(set_to_none=True)
        for rows in parts:
            torch.manual_seed(7)
            with Rows(rows, len(x)) as noise:
                self.loss(x[rows], y[rows], len(x)).backward()
            assert bool(noise.draws) == self.draws
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


class Attention(Case):
    """The mean over sequences, and the divergence over the number of training sequences."""

    def __init__(self, dtype: torch.dtype, sampling: str, **options: Any) -> None:
        layer = gpseq.nn.SGPATransformerEncoderLayer(
            8, 2, 16, 0.0, batch_first=True, num_inducing=4, sampling=sampling, **options
        )
        model = nn.Sequential(gpseq.nn.SGPATransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(40, 3))
        self.draws = sampling != "mean"
        super().__init__(model.to(dtype))

    def loss(self, x: Tensor, y: Tensor, size: int) -> Tensor:
        mean = nn.functional.cross_entropy(self.model(x), y)
        return (mean + kl_divergence(self.model, num_data=NUM_DATA) / NUM_DATA) * len(x) / size


class Series(Case):
    """A sum over series, so it is divided by the size of the whole batch."""

    draws = True

    def __init__(self, dtype: torch.dtype, sparse: bool) -> None:
        prior: dict[str, Any] = {"prior": "matern32"}
        if sparse:
            kernel = gpytorch.kernels.RBFKernel(batch_shape=torch.Size([2]))
            prior = {"features": gpseq.features.HippoFeatures(6, horizon=5.0), "covar_module": kernel}
        vae = gpseq.generative.GPPriorVAE(nn.Linear(8, 4), nn.Linear(2, 8), num_latents=2, noise=0.5, **prior)
        super().__init__(vae.to(dtype))

    def output(self, x: Tensor) -> Any:
        return self.model(torch.linspace(0, 5, x.shape[1], dtype=x.dtype).expand(x.shape[:2]), x)

    def loss(self, x: Tensor, y: Tensor, size: int) -> Tensor:
        return self.output(x).loss / size


class Student(Case):
    """A mean over sequences of one length, behind a calibration on the whole batch."""

    def __init__(self, dtype: torch.dtype, forcing: str) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        teacher = nn.Sequential(encoder, nn.Flatten(), nn.Linear(40, 3)).to(dtype).eval().requires_grad_(False)
        self.distiller = gpseq.reconfiguration.Distiller(teacher, forcing=forcing, dropout=0.0)
        self.draws = forcing == "rollout"
        self.distiller.calibrate(batch(dtype)[0])
        super().__init__(self.distiller.rollout)

    def loss(self, x: Tensor, y: Tensor, size: int) -> Tensor:
        return self.distiller.loss(x, y) * len(x) / size


CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "attention-mean": lambda dtype: Attention(dtype, "mean"),
    "attention-marginal": lambda dtype: Attention(dtype, "marginal"),
    "attention-joint": lambda dtype: Attention(dtype, "joint"),
    "attention-cheng_boots": lambda dtype: Attention(dtype, "mean", form="cheng_boots"),
    "attention-residual": lambda dtype: Attention(dtype, "mean", mode="residual"),
    "series-exact": lambda dtype: Series(dtype, sparse=False),
    "series-sparse": lambda dtype: Series(dtype, sparse=True),
    "student-rollout": lambda dtype: Student(dtype, "rollout"),
}


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Eight sequences of five tokens, with labels."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 5, 8, generator=generator, dtype=torch.float64).to(dtype), torch.arange(8) % 3


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest entry of a parameter's gradient, if that is more than one."""
    assert found.keys() == expected.keys() and expected
    return max(
        ((found[name] - value).abs().max() / value.abs().max().clamp(min=1.0)).item()
        for name, value in expected.items()
    )


@pytest.mark.parametrize("sizes", [(4, 4), (3, 5), (1, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", CASES)
def test_micro_batches_sum_to_the_batch(kind: str, sizes: tuple[int, ...]) -> None:
    case, (x, y) = CASES[kind](torch.float64), batch()
    whole = case.gradients([range(8)], x, y)
    parts = [part.tolist() for part in torch.arange(8).split(sizes)]
    assert distance(case.gradients(parts, x, y), whole) < 1e-10


@pytest.mark.parametrize("kind", ["attention-mean", "student-rollout"])
def test_weights_of_unequal_micro_batches_matter(kind: str) -> None:
    """The same sum with equal weights is another gradient: what is tested above can fail."""
    case, (x, y) = CASES[kind](torch.float64), batch()
    whole = case.gradients([range(8)], x, y)
    weighted = case.loss
    case.loss = lambda x, y, size: weighted(x, y, size) * (size / len(x)) / 2  # type: ignore[method-assign]
    assert distance(case.gradients([range(2), range(2, 8)], x, y), whole) > 1e-3


def test_divergence_counts_once() -> None:
    """Of the inducing keys it is that of one batch, and neither twice nor half."""
    case, (x, y) = CASES["attention-residual"](torch.float64), batch()
    name = "0.layers.0.self_attn.inducing.log_diagonal"  # without noise only the divergence sees it
    found = case.gradients([range(3), range(3, 8)], x, y)[name]
    case.model.zero_grad()
    case.model(x)
    (kl_divergence(case.model, num_data=NUM_DATA) / NUM_DATA).backward()
    expected = case.model.get_parameter(name).grad
    assert expected is not None and expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


#: Relative error of the loss, and of all gradients together, of products with eight binary digits: four to five times
#: the largest that was measured, that of the student.
LOOSE = {"loss": 0.01, "gradient": 0.05}
MIXED = ["attention-mean", "attention-marginal", "attention-joint", "series-exact", "series-sparse", "student-rollout"]


@pytest.mark.parametrize("kind", MIXED)
def test_mixed_precision(kind: str) -> None:
    """Parameters, gradients and losses stay in float32; nothing is lost that a scaler would bring back."""
    case, (x, y) = CASES[kind](torch.float32), batch(torch.float32)
    values, gradients = [], []
    for enabled in (False, True):
        case.model.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = case.loss(x, y, len(x))
        assert loss.dtype == torch.float32
        loss.backward()
        values.append(loss.detach())
        found = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
        assert all(p.dtype == torch.float32 for p in case.model.parameters())
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())
        gradients.append(torch.cat([g.flatten() for g in found.values()]))
    assert values[0] != values[1], "autocast did nothing"
    assert (values[1] - values[0]).abs() < LOOSE["loss"] * values[0].abs()
    assert (gradients[1] - gradients[0]).norm() < LOOSE["gradient"] * gradients[0].norm()
    # The exponents of bfloat16 are those of float32: gradients do not vanish, so that no GradScaler is needed.
    lost = (gradients[1] == 0) & (gradients[0] != 0)
    assert lost.double().mean() < 0.01
    assert gradients[0][lost].abs().sum() < 1e-4 * gradients[0].abs().sum()


def test_gp_algebra_under_autocast() -> None:
    """Tokens and codes come short; divergences and moments of the processes do not."""
    x = batch(torch.float32)[0]
    attention, series = CASES["attention-joint"](torch.float32), Series(torch.float32, sparse=False)
    sparse, student = Series(torch.float32, sparse=True), Student(torch.float32, "rollout")
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.model[2](x.flatten(1)).dtype == torch.bfloat16  # a plain layer is short
        attention.model(x)
        layer = attention.model[0].layers[0].self_attn
        assert layer.posterior(x, x, x).variance.dtype == torch.float32
        outputs = [series.output(x), sparse.output(x)]
        losses = student.distiller.losses(x, batch()[1])
    assert kl_divergence(attention.model, num_data=NUM_DATA).dtype == torch.float32
    for out in outputs:
        assert out.loss.dtype == out.posterior.mean.dtype == out.posterior.variance.dtype == torch.float32
        assert out.kl.dtype in (torch.float32, torch.float64) and out.elbo.dtype == torch.float64
    assert {value.dtype for value in losses.values()} == {torch.float32}


def answers(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients, of a loss with the divergence, at one seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    out = call(x)
    (out.square().mean() + kl_divergence(model, num_data=NUM_DATA) / NUM_DATA).backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def encoder(num_layers: int, sampling: str, dtype: torch.dtype) -> nn.Module:
    """With processes for attention."""
    layer = gpseq.nn.SGPATransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, num_inducing=4, sampling=sampling)
    return gpseq.nn.SGPATransformerEncoder(layer, num_layers).to(dtype).train()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_encoder_is_one_graph() -> None:
    import torch._dynamo

    model, x = encoder(2, "marginal", torch.float64), batch()[0]
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    torch._dynamo.reset()
    eager = answers(model, model, x)
    compiled = answers(torch.compile(model, backend="aot_eager", fullgraph=True), model, x)
    # The same draws too, at one seed.
    torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning")
def test_compiled_encoder_by_inductor() -> None:
    """About a minute, nearly all of it in the C++ compiler."""
    import torch._dynamo

    torch._dynamo.reset()
    model, x = encoder(1, "mean", torch.float32), torch.randn(4, 5, 8)
    eager = answers(model, model, x)
    compiled = answers(torch.compile(model, fullgraph=True), model, x)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_with_micro_batches(tmp_path: Path) -> None:
    """``fully_shard`` of the backbone, and DDP, with accumulation: gradients and a step are those of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.fsdp_worker", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [torch.load(tmp_path / f"fsdp-{rank}.pt") for rank in range(2)]
    for kind in worker.KINDS:
        expected, start = worker.step(kind, 2, None), dict(worker.build(kind).named_parameters())
        for way in worker.WAYS:
            steps = [one["steps"][kind, way] for one in found]
            for what in ("gradients", "parameters"):
                assert expected[what].keys() == steps[0][what].keys() == steps[1][what].keys() == start.keys()
                for name, value in expected[what].items():
                    scale = max(1.0, value.abs().max().item())
                    assert (steps[0][what][name] - value).abs().max() < 1e-6 * scale, (kind, way, what, name)
                    assert torch.equal(steps[0][what][name], steps[1][what][name]), (kind, way, what, name)
            assert not any(torch.equal(value, steps[0]["parameters"][name]) for name, value in start.items())
        for name, sharded in found[0]["steps"][kind, "sharded"]["sharded"].items():
            assert sharded.item() != any(part in name for part in ("inducing", "prior", "likelihood")), (kind, name)
    # What makes the recipe necessary: without it these parameters are refused.
    assert all(len(one["refused"]) == 1 and "scalar parameters" in one["refused"][0] for one in found)
