"""The diagonal Fisher against a loop over single examples, and against closed forms."""

import pytest
import torch
from torch import Tensor, nn

from gpseq.continual import Family, bernoulli, categorical, fisher_diagonal, gaussian, tasks_by_key


def make(dtype: torch.dtype, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).to(dtype)


def loop(model: nn.Module, x: Tensor, y: Tensor, family: Family) -> dict[str, Tensor]:
    """Mean of squared gradients, one example and one backward pass at a time."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for number in range(len(x)):
        model.zero_grad()
        family.log_prob(model(x[number : number + 1]), y[number : number + 1]).sum().backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                total[name] += p.grad.square()
    return {name: value / len(x) for name, value in total.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerances: float) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerances)


TARGETS = {
    "categorical": (categorical(), 3, lambda n: torch.randint(3, (n,))),
    "bernoulli": (bernoulli(), 2, lambda n: torch.randint(2, (n, 2))),
    "gaussian": (gaussian(0.3), 3, lambda n: torch.randn(n, 3)),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_empirical_fisher_is_a_loop_over_examples(name, chunk_size, dtype):
    family, outputs, draw = TARGETS[name]
    model, x, y = make(dtype, outputs), torch.randn(10, 4, dtype=dtype), draw(10)
    y = y.to(dtype) if y.is_floating_point() else y
    batches = [(x[:3], y[:3]), [x[3:], y[3:]]]  # batches of unequal size count by their examples
    found = fisher_diagonal(model, batches, family, empirical=True, chunk_size=chunk_size)
    assert_same(found, loop(model, x, y, family))
    assert all(value.dtype == dtype for value in found.values())
    summed = fisher_diagonal(model, batches, family, empirical=True, reduction="sum")
    assert_same({n: v / 10 for n, v in summed.items()}, found)


@pytest.mark.parametrize("name", ["categorical", "bernoulli"])
def test_exact_fisher_is_the_expectation_over_labels(name):
    outputs = 3 if name == "categorical" else 1
    model, x = make(torch.float64, outputs), torch.randn(6, 4, dtype=torch.float64)
    family = {"categorical": categorical(), "bernoulli": bernoulli()}[name]
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for number in range(6):
        output = model(x[number : number + 1])
        probability = (
            output.softmax(-1)[0] if outputs > 1 else torch.cat([1 - output.sigmoid(), output.sigmoid()])[:, 0]
        )
        for label, weight in enumerate(probability.detach()):
            y = torch.tensor([label] if outputs > 1 else [[label]])
            for n, value in loop(model, x[number : number + 1], y, family).items():
                expected[n] += weight * value / 6
    assert_same(fisher_diagonal(model, [x], name, num_samples=None), expected)


def test_linear_regression_has_a_closed_form(dtype):
    """F = mean of x^2 over the noise variance, whatever the weights and the targets are."""
    model, x = nn.Linear(3, 2).to(dtype), torch.randn(40, 3, dtype=dtype)
    expected = {"weight": (x.square().mean(0) / 0.5).expand(2, 3), "bias": torch.full((2,), 2.0, dtype=dtype)}
    assert_same(fisher_diagonal(model, list(x.split(7)), gaussian(0.5), num_samples=None), expected)
    sampled = fisher_diagonal(model, [x.repeat(1000, 1)], gaussian(0.5), num_samples=1, chunk_size=10_000)
    assert_same(sampled, expected, rtol=0.05, atol=0.0)


def test_logistic_regression_has_a_closed_form(dtype):
    """F = mean of p (1 - p) x^2."""
    model, x = nn.Linear(3, 1).to(dtype), torch.randn(40, 3, dtype=dtype)
    p = model(x).sigmoid().detach()
    expected = {"weight": (p * (1 - p) * x.square()).mean(0, keepdim=True), "bias": (p * (1 - p)).mean(0)}
    assert_same(fisher_diagonal(model, [x], "bernoulli", num_samples=None), expected)
    assert_same(
        fisher_diagonal(model, [x.repeat(1000, 1)], "bernoulli", chunk_size=10_000), expected, rtol=0.06, atol=0.0
    )


def test_softmax_regression_has_a_closed_form():
    """F of the weights of class c = mean of p_c (1 - p_c) x^2; sampling comes close."""
    model, x = nn.Linear(3, 4, bias=False).double(), torch.randn(50, 3, dtype=torch.float64)
    p = model(x).softmax(-1).detach()
    expected = {"weight": torch.einsum("nc,nd->cd", p * (1 - p), x.square()) / 50}
    assert_same(fisher_diagonal(model, [x], num_samples=None), expected)
    assert_same(
        fisher_diagonal(model, [x.repeat(100, 1)], num_samples=9, chunk_size=5000), expected, rtol=0.06, atol=0.0
    )


def test_the_generator_decides_and_nothing_is_seeded():
    model, x = make(torch.float32), torch.randn(5, 4)
    before = torch.get_rng_state()
    for family, outputs in (("categorical", 3), ("bernoulli", 3), ("gaussian", 3)):
        model = model if outputs == 3 else make(torch.float32, outputs)
        draws = [
            fisher_diagonal(model, [x], family, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        ]
        assert torch.equal(draws[0]["0.weight"], draws[1]["0.weight"])
        assert not torch.equal(draws[0]["0.weight"], draws[2]["0.weight"])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(*(fisher_diagonal(model, [x])["0.weight"] for _ in range(2)))


class Normalised(nn.Module):
    """A network with everything that behaves differently while it trains, and a buffer that counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(48, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.last(self.drop(self.norm(self.first(x)).relu()).flatten(1))


def test_evaluation_mode_meanwhile_and_afterwards_all_is_as_before():
    model = Normalised().train()
    model(torch.randn(8, 1, 6, 6))  # statistics that are not those of the batch below
    model.norm.eval()  # modes may be mixed
    x, y = torch.randn(6, 1, 6, 6), torch.randint(3, (6,))
    model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    found = fisher_diagonal(model, [(x, y)], empirical=True)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.eval()
    assert_same(found, loop(model, x, y, categorical()))
    calls = model.calls.clone()
    fisher_diagonal(model, [x])  # labels are drawn from predictions, which change nothing either
    assert torch.equal(model.calls, calls)
    with pytest.raises(ValueError, match="batches"):
        fisher_diagonal(model.train(), [])
    assert model.drop.training  # after an error too


def test_frozen_parameters_are_skipped():
    model = make(torch.float32)
    model[0].requires_grad_(False)
    x, y = torch.randn(4, 4), torch.randint(3, (4,))
    found = fisher_diagonal(model, [(x, y)], empirical=True)
    assert_same(found, loop(model, x, y, categorical()))
    assert list(found) == ["2.weight", "2.bias"]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="model: expected at least one parameter that requires gradients"):
        fisher_diagonal(model, [x])


def test_a_shared_parameter_appears_once_with_all_that_it_does():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second)
    x, y = torch.randn(5, 3), torch.randint(3, (5,))
    found = fisher_diagonal(model, [(x, y)], empirical=True)
    assert list(found) == ["0.weight"]
    assert_same(found, loop(model, x, y, categorical()))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.layer(torch.cat([a, b], dim=-1))


def test_models_of_several_inputs_and_a_log_density_of_ones_own():
    model, a, b, y = TwoInputs(), torch.randn(6, 2), torch.randn(6, 3), torch.randn(6, 2)

    def laplace(output: Tensor, target: Tensor) -> Tensor:
        return -(output - target).abs()

    found = fisher_diagonal(model, [((a, b), y)], laplace, empirical=True)
    expected = loop(nn.Sequential(model.layer), torch.cat([a, b], dim=-1), y, Family(laplace))
    assert_same({name.replace("layer", "0"): value for name, value in found.items()}, expected)
    with pytest.raises(ValueError, match="family: expected one with sample, or empirical=True"):
        fisher_diagonal(model, [((a, b), y)], laplace)
    with pytest.raises(ValueError, match="family: expected one with support"):
        fisher_diagonal(model, [((a, b), y)], laplace, num_samples=None)


def test_a_data_loader_will_do_and_labels_are_not_read_without_need():
    model, x, y = make(torch.float64), torch.randn(10, 4, dtype=torch.float64), torch.full((10,), 99)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    assert_same(fisher_diagonal(model, loader, num_samples=None), fisher_diagonal(model, [x], num_samples=None))


def test_it_works_where_gradients_are_off():
    model, x, y = make(torch.float32), torch.randn(5, 4), torch.randint(3, (5,))
    with torch.no_grad():
        found = fisher_diagonal(model, [(x, y)], empirical=True)
    assert_same(found, loop(model, x, y, categorical()))
    assert not any(value.requires_grad for value in found.values())


M, X4, Y4 = make(torch.float32), torch.randn(4, 4), torch.zeros(4, dtype=torch.int64)
BAD = {
    "empty": ([], {}, "batches: expected at least one example, got none"),
    "empty batch": ([X4[:0]], {}, "batches: expected at least one example, got none"),
    "no targets": ([X4], {"empirical": True}, r"batches: expected \(x, y\), because the empirical Fisher"),
    "lengths": ([(X4, Y4[:2])], {"empirical": True}, "batches: expected as many targets as inputs"),
    "three": ([(X4, Y4, Y4)], {}, "batches: expected x or .* got 3 parts"),
    "NaN": ([X4 * torch.nan], {"family": "gaussian"}, "model: expected finite gradients.*'0.weight'"),
    "family": ([X4], {"family": "poisson"}, "family: expected one of .* got 'poisson'"),
    "samples": ([X4], {"num_samples": 0}, "num_samples: expected at least 1"),
    "reduction": ([X4], {"reduction": "max"}, "reduction: expected 'mean' or 'sum'"),
    "chunk": ([X4], {"chunk_size": 0}, "chunk_size: expected at least 1"),
    "one class": (
        [X4],
        {"model": make(torch.float32, 1)},
        r"family: .* 'categorical', got \(n, 1\); .* 'gaussian' .* 'bernoulli'",
    ),
    "one class, exactly": ([X4], {"model": make(torch.float32, 1), "num_samples": None}, r"family: .* got \(n, 1\)"),
    "one class, empirical": (
        [(X4, Y4)],
        {"model": make(torch.float32, 1), "empirical": True},
        r"family: .* got \(n, 1\)",
    ),
    "no class axis": (
        [X4],
        {"model": nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))},
        r"family: expected outputs \(n, C\) .* got \(n,\)",
    ),
    "float labels": (
        [(X4, Y4.float())],
        {"empirical": True},
        r"labels of torch.int64 .* got torch.float32 of shape \(4,\)",
    ),
    "label columns": ([(X4, Y4[:, None])], {"empirical": True}, r"labels of torch.int64 and shape \(4,\) .* \(4, 1\)"),
    "no such label": ([(X4, Y4 + 3)], {"empirical": True}, "labels from 0 to 2 for 3 outputs, got 3"),
    "negative label": ([(X4, Y4 - 1)], {"empirical": True}, "labels from 0 to 2 for 3 outputs, got -1"),
    "signs": (
        [(X4, torch.tensor([[1.0], [-1.0], [1.0], [1.0]]).expand(4, 3))],
        {"empirical": True, "family": "bernoulli"},
        "batches: expected labels 0 or 1 for 'bernoulli', got -1",
    ),
    "few targets": (
        [(X4, X4[:, :2])],
        {"empirical": True, "family": "gaussian"},
        r"batches: expected targets of shape \(4, 3\), as the outputs have, got \(4, 2\)",
    ),
    "several labels": ([X4], {"family": "bernoulli", "num_samples": None}, "num_samples: expected a number"),
}


@pytest.mark.parametrize(("batches", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(batches, options, message):
    with pytest.raises(ValueError, match=message):
        fisher_diagonal(**({"model": M, "batches": batches} | options))


def test_arguments_of_the_wrong_kind():
    with pytest.raises(TypeError, match="batches: expected tensors, got ndarray"):
        fisher_diagonal(M, [X4.numpy()])
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator or None, got 0"):
        fisher_diagonal(M, [X4], generator=0)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got builtin"):
        fisher_diagonal(torch.sin, [X4])
    with pytest.raises(TypeError, match="family: expected a name, a Family or a function, got int"):
        fisher_diagonal(M, [X4], 3)
    with pytest.raises(ValueError, match="noise: expected a positive variance"):
        gaussian(0.0)


@pytest.mark.parametrize(
    ("batches", "got"),
    [
        (X4, "Tensor"),
        ((X4, Y4), "a tuple of tensors"),
        ((X4,), "a tuple of tensors"),
        (tasks_by_key(X4, Y4, 1)[0], "Task"),
        (3, "int"),
        (None, "NoneType"),
    ],
)
def test_a_batch_is_no_list_of_batches(batches, got):
    """Rows of one tensor would be taken for batches, and targets for inputs."""
    calls = []
    model = make(torch.float32)
    model.register_forward_hook(lambda *_: calls.append(1))
    expected = rf"batches: expected a list or loader of x or \(x, y\), got {got}; write \[x\]"
    with pytest.raises(TypeError, match=expected):
        fisher_diagonal(model, batches, num_samples=None)
    assert not calls
    assert_same(
        fisher_diagonal(model, ((X4, Y4), (X4, Y4)), num_samples=None), fisher_diagonal(model, [X4], num_samples=None)
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory, self.last = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.memory(x)[0][:, -1])


def test_a_network_that_cannot_be_mapped_is_named():
    with pytest.raises(RuntimeError, match=r"model: expected gradients .* by torch.func.vmap.* \(torch.nn.GRU"):
        fisher_diagonal(Recurrent(), [torch.randn(5, 6, 4)])


def test_labels_that_suit_the_family_pass_in_any_form():
    """Bernoulli and Gaussian targets of one output may lack the last axis; labels may be bools."""
    model, x = make(torch.float64, 1), torch.randn(6, 4, dtype=torch.float64)
    label = torch.tensor([0, 1, 1, 0, 1, 0])
    expected = loop(model, x, label.double(), bernoulli())
    for y in (label, label.bool(), label.double().unsqueeze(-1)):
        assert_same(fisher_diagonal(model, [(x, y)], "bernoulli", empirical=True), expected)
    y = torch.randn(6, dtype=torch.float64)
    assert_same(fisher_diagonal(model, [(x, y)], "gaussian", empirical=True), loop(model, x, y, gaussian()))
