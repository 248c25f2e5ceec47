"""What frames say about their image: against the covariance of everything at once, and against draws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpseq import datasets
from gpseq.generative.corruptions import Compose, Downsample, GaussianBlur, GaussianNoise, Grayscale, Mask
from gpseq.generative.frame_matrices import linear_frames
from gpseq.generative.frames import ORDERS
from gpseq.generative.information import InformationReport, expected_bias, information_report
from tests.oracles_generative_frames import blur_maps, by_eigenvalues, by_log_determinants, joint_covariance

CORRUPTIONS = {
    "blur": GaussianBlur(0.6),
    "blur, listed": GaussianBlur([0.0, 0.5, 1.0, 1.0]),
    "downsample": Downsample([1, 2, 2, 4]),
    "gray": Compose([Grayscale((0.2, 0.8)), GaussianBlur(0.5)]),
    "noise": Compose([GaussianNoise(0.1), GaussianBlur(0.5), GaussianNoise([0.0, 0.2, 0.1, 0.3])]),
}
SHAPE = (2, 3, 4)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


def eye(size: int) -> torch.Tensor:
    """The identity in float64."""
    return torch.eye(size, dtype=torch.float64)


def random_covariance(size: int, seed: int = 0) -> torch.Tensor:
    """Of full rank."""
    root = torch.randn(size, size, generator=seeded(seed), dtype=torch.float64)
    return root @ root.mT / size + 0.05 * eye(size)


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    """The 1437 digits of the table, from -1 to 1, ``(n, 1, 8, 8)``."""
    pixels = torch.tensor(pytest.importorskip("sklearn.datasets").load_digits().data) / 8 - 1
    return pixels[torch.randperm(len(pixels), generator=seeded())[:1437]].view(-1, 1, 8, 8)


@pytest.fixture(scope="module")
def shipped() -> torch.Tensor:
    """Digits that ship with the package, made smaller, from -1 to 1, ``(n, 1, 7, 7)``."""
    pixels = datasets.load_images().x_train.double().unsqueeze(1) / 127.5 - 1
    return torch.nn.functional.avg_pool2d(pixels[:1500], 4)


def dense(images: torch.Tensor, order: str) -> torch.Tensor:
    """Covariance of image and frames of the table, from a blur pixel by pixel."""
    shape = images.shape[1:]
    size = math.prod(shape)
    flat = images.flatten(1)
    covariance = torch.cov(flat.mT) + 1e-3 * eye(size)
    steps = [blur_maps(1.5, shape)] * 4
    direct = [blur_maps(1.5 * math.sqrt(i), shape) for i in range(1, 5)]
    return joint_covariance(covariance, order, steps, direct, [0.09 * eye(size)] * 4)


def check_against(report: InformationReport, joint: torch.Tensor, size: int, tolerance: float) -> None:
    """Every number of a report by both slow routes."""
    distances = list(range(1, report.num_frames))
    for i in distances:
        assert abs(by_log_determinants(joint, size, [i]) - report.single[i - 1]) < tolerance
        assert abs(by_eigenvalues(joint, size, [i])[0] - report.single[i - 1]) < tolerance
    total, mmse = by_eigenvalues(joint, size, distances)
    assert abs(total - report.total) < tolerance and abs(mmse - report.mmse_total) < tolerance
    assert abs(by_log_determinants(joint, size, distances) - report.total) < tolerance
    assert abs(by_eigenvalues(joint, size, [1])[1] - report.mmse_last) < tolerance


# I(x_T; x_1), I(x_T; x_T-1), I(x_T; all), gain, MMSE from x_T-1 and from all; the first row is the specification's.
TABLE = {
    "markov": (0.888146, 4.641250, 4.641250, 0.0, 0.181323, 0.181323),
    "star": (1.840242, 4.641250, 6.427724, 1.786474, 0.181323, 0.169899),
    "average": (2.703694, 4.641250, 5.623006, 0.981756, 0.181323, 0.169861),
    "matched": (0.888146, 4.641250, 5.718978, 1.077728, 0.181323, 0.172940),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_table_of_digits(digits, order):
    report = information_report(GaussianBlur(1.5), order, 5, 0.3, images=digits)
    found = (report.first, report.last, report.total, report.gain, report.mmse_last, report.mmse_total)
    assert report.exact and report.bias_total == 0
    assert found == pytest.approx(TABLE[order], abs=1e-6)
    check_against(report, dense(digits, order), 64, 1e-8)
    if order == "markov":
        row = "markov         0.89           4.64         4.64   0.000           0.1813         0.1813"
        assert str(report).splitlines()[1] == row


@pytest.mark.parametrize("order", ORDERS)
def test_the_table_of_shipped_digits(shipped, order):
    report = information_report(GaussianBlur(1.5), order, 5, 0.3, images=shipped)
    check_against(report, dense(shipped, order), 49, 1e-8)
    first_order = information_report(GaussianBlur(1.5), "markov", 5, 0.3, images=shipped)
    if order != "markov":
        assert report.total > first_order.total + 0.1 and report.mmse_total < first_order.mmse_total - 1e-3


@pytest.mark.parametrize("corruption", CORRUPTIONS.values(), ids=list(CORRUPTIONS))
@pytest.mark.parametrize("order", ORDERS)
def test_reports_equal_those_of_the_dense_covariance(corruption, order):
    covariance, size = random_covariance(math.prod(SHAPE)), math.prod(SHAPE)
    report = information_report(corruption, order, 4, 0.4, covariance, SHAPE)
    steps = [corruption.matrix(SHAPE, i, i - 1) for i in range(1, 4)]
    direct = [corruption.matrix(SHAPE, i) for i in range(1, 4)]
    noises = [corruption.covariance(SHAPE, i, 0 if order == "star" else i - 1) + 0.16 * eye(size) for i in range(1, 4)]
    joint = joint_covariance(covariance, order, steps, direct, noises)
    check_against(report, joint, size, 1e-9)
    # And frame by frame: given the image, what is alone has the moments of the joint covariance.
    for i, frame in enumerate(linear_frames(corruption, order, 4, 0.4, SHAPE, covariance), start=1):
        part = slice(i * size, (i + 1) * size)
        loading = torch.linalg.solve(covariance, joint[:size, part]).mT
        torch.testing.assert_close(frame.loading, loading, rtol=0, atol=1e-9)
        left = joint[part, part] - loading @ joint[:size, part]
        torch.testing.assert_close(frame.noise, left, rtol=0, atol=1e-9)


@given(
    num_frames=st.integers(2, 7),
    width=st.floats(0, 3),
    noise=st.floats(0.05, 3),
    scale=st.floats(0.1, 10),
    seed=st.integers(0, 100),
)
def test_laws(num_frames, width, noise, scale, seed):
    covariance, shape = random_covariance(9, seed), (1, 3, 3)
    reports = {
        order: information_report(GaussianBlur(width), order, num_frames, noise, covariance, shape) for order in ORDERS
    }
    markov, matched = reports["markov"], reports["matched"]
    # A chain: nothing beyond its last frame, and less and less before it.
    assert abs(markov.gain) < 1e-8 and markov.mmse_total == pytest.approx(markov.mmse_last, abs=1e-12)
    assert all(near >= far - 1e-10 for near, far in zip(markov.single[:-1], markov.single[1:], strict=True))
    # Each frame of the matched star is the chain's.
    assert matched.single == pytest.approx(markov.single, abs=1e-8)
    variance = covariance.diagonal().mean().item()
    for order, report in reports.items():
        assert len(report.single) == num_frames - 1 and report.exact
        assert report.last == pytest.approx(markov.last, abs=1e-10)
        assert all(-1e-10 <= single <= report.total + 1e-10 for single in report.single)
        assert report.total <= sum(report.single) + 1e-8 or order == "average"  # independent given the image
        assert 0 < report.mmse_total <= report.mmse_last + 1e-12 <= variance + 1e-9
        if num_frames > 2 and order != "markov":
            assert report.gain > 0 and report.mmse_total < markov.mmse_total
    # Units do not matter.
    other = information_report(GaussianBlur(width), "star", num_frames, scale * noise, scale**2 * covariance, shape)
    assert other.total == pytest.approx(reports["star"].total, rel=1e-9)
    assert other.mmse_total == pytest.approx(scale**2 * reports["star"].mmse_total, rel=1e-9)


def test_one_pixel_by_hand():
    """A pixel of variance 4, seen twice with noise of variance 1; of a chain only the nearer counts."""
    covariance = torch.full((1, 1), 4.0)
    star, chain, matched = (
        information_report(GaussianBlur(1.0), order, 3, 1.0, covariance, (1, 1, 1))
        for order in ("star", "markov", "matched")
    )
    assert star.total == pytest.approx(0.5 * math.log(9)) and star.mmse_total == pytest.approx(4 / 9)
    assert chain.total == pytest.approx(0.5 * math.log(5)) and chain.first == pytest.approx(0.5 * math.log(3))
    assert matched.total == pytest.approx(0.5 * math.log(1 + 4 * 1.5))


def test_an_image_may_be_singular():
    """Only one direction varies: the same as the pixel that it is seen as."""
    direction = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    report = information_report(GaussianBlur(0.0), "star", 3, 1.0, 4 * direction @ direction.mT, (1, 1, 2))
    assert report.total == pytest.approx(0.5 * math.log(9)) and report.mmse_total == pytest.approx(2 / 9)
    nothing = information_report(GaussianBlur(1.0), "star", 3, 1.0, torch.zeros(2, 2), (1, 1, 2))
    assert nothing.total == 0 and nothing.mmse_total == 0


def test_images_stand_for_their_covariance_plus_a_ridge(dtype):
    images = torch.rand(50, 2, 3, 3, dtype=dtype)
    covariance = torch.cov(images.double().flatten(1).mT) + 0.01 * eye(18)
    expected = information_report(GaussianBlur(0.5), "star", 4, 0.2, covariance, (2, 3, 3))
    found = information_report(GaussianBlur(0.5), "star", 4, 0.2, images=images, ridge=0.01)
    assert found.single == pytest.approx(expected.single, abs=1e-9)
    assert found.total == pytest.approx(expected.total, abs=1e-9)
    assert found == information_report(
        GaussianBlur(0.5), "star", 4, 0.2, image_shape=(2, 3, 3), images=images, ridge=0.01
    )


def test_bytes_are_scaled():
    images = torch.randint(256, (40, 1, 3, 3), dtype=torch.uint8)
    found = information_report(GaussianBlur(0.5), "star", 3, 0.2, images=images)
    expected = information_report(GaussianBlur(0.5), "star", 3, 0.2, images=images.float() / 255)
    assert found.total == pytest.approx(expected.total, abs=1e-6)


@pytest.mark.filterwarnings("ignore:The bias of estimates")
@pytest.mark.parametrize("order", ORDERS)
def test_an_estimate_less_its_bias_is_the_exact_report(order):
    shape, corruption = (1, 2, 2), GaussianBlur(0.4)
    covariance = random_covariance(4)
    exact = information_report(corruption, order, 4, 0.5, covariance, shape)
    found = information_report(
        corruption, order, 4, 0.5, covariance, shape, method="sample", num_samples=100_000, generator=seeded()
    )
    assert found.num_samples == 100_000 and not found.exact and found.order == order
    for estimate, truth in zip(found.single, exact.single, strict=True):
        assert estimate - found.bias_single == pytest.approx(truth, abs=0.02)
    assert found.total - found.bias_total == pytest.approx(exact.total, abs=0.02)
    assert found.mmse_last == pytest.approx(exact.mmse_last, rel=0.02)
    assert found.mmse_total == pytest.approx(exact.mmse_total, rel=0.02)


@pytest.mark.filterwarnings("ignore:The bias of estimates")
def test_the_bias_is_that_of_small_samples():
    """Averaged over many reports from few draws, which alone are far off."""
    covariance, shape, blur = random_covariance(4), (1, 2, 2), GaussianBlur(0.4)
    exact = information_report(blur, "star", 3, 0.5, covariance, shape)
    found = [
        information_report(
            blur, "star", 3, 0.5, covariance, shape, method="sample", num_samples=40, generator=seeded(seed)
        )
        for seed in range(120)
    ]
    single = sum(report.last for report in found) / 120 - exact.last
    total = sum(report.total for report in found) / 120 - exact.total
    assert single == pytest.approx(found[0].bias_single, abs=0.15) and found[0].bias_single > 0.2
    assert total == pytest.approx(found[0].bias_total, abs=0.15) and found[0].bias_total > 0.4
    mmse = sum(report.mmse_total for report in found) / 120
    assert mmse == pytest.approx(exact.mmse_total, rel=0.05)


@given(first=st.integers(1, 60), second=st.integers(1, 60))
def test_the_bias_is_about_half_the_product_by_the_draws(first, second):
    assert expected_bias(10**6, first, second) == pytest.approx(first * second / 2e6, rel=1e-3)
    assert expected_bias(200, first, second) == pytest.approx(expected_bias(200, second, first), rel=1e-9)
    assert expected_bias(200, first, second) > first * second / 400


def test_draws_of_a_chain_feign_a_gain(digits):
    """1437 draws, as many as there are images: 11.1 for 4.64, as its bias says, and a warning."""
    covariance = torch.cov(digits.flatten(1).mT) + 1e-3 * eye(64)
    with pytest.warns(UserWarning, match="from 1,437 draws is more than a tenth .* gain"):
        report = information_report(
            GaussianBlur(1.5),
            "markov",
            5,
            0.3,
            covariance,
            (1, 8, 8),
            method="sample",
            num_samples=1437,
            generator=seeded(),
        )
    assert report.total == pytest.approx(11.1, abs=0.4) and report.gain == pytest.approx(5.0, abs=0.4)
    assert report.total - report.bias_total == pytest.approx(4.64, abs=0.4)
    lines = str(report).splitlines()
    assert len(lines) == 3 and "+6.4" in lines[2] and "from 1,437 draws" in lines[2]


def test_masks_are_estimated():
    images = torch.rand(400, 1, 2, 2, generator=seeded())
    report = information_report(Mask(0.2), "star", 3, 0.1, images=images, num_samples=20_000, generator=seeded(1))
    assert report.num_samples == 20_000 and report.bias_total == pytest.approx(4 * 8 / 40_000, rel=0.01)
    assert report.gain > 0.1 and report.first < report.last
    again = information_report(Mask(0.2), "star", 3, 0.1, images=images, num_samples=20_000, generator=seeded(1))
    assert again == report
    with pytest.warns(UserWarning, match="from 400 draws"):
        few = information_report(Mask(0.4), "markov", 3, 0.1, images=images, generator=seeded())
    assert few.num_samples == 400


def test_a_mask_by_hand():
    """Two pixels, each there with a known probability: so are variance and covariance with the image."""
    report = information_report(
        Mask([0.0, 0.5]), "star", 2, 0.5, torch.eye(2), (1, 1, 2), num_samples=200_000, generator=seeded()
    )
    # A mask spares one of two pixels, so that one is gone with probability 1/2 less a half of 1/4.
    kept = 0.5 + 0.125
    correlation = kept**2 / (kept + 0.25)
    assert report.total == pytest.approx(-math.log(1 - correlation), abs=0.01)
    assert report.mmse_total == pytest.approx(1 - correlation, abs=0.01)


def test_callables_are_estimated():
    def twice(later, image, distance, generator):
        return image + 0.5 * torch.randn(image.shape, generator=generator).to(image)

    covariance = random_covariance(4)
    found = information_report(None, twice, 3, 0.0, covariance, (1, 2, 2), num_samples=100_000, generator=seeded())
    exact = information_report(GaussianBlur(0.0), "star", 3, 0.5, covariance, (1, 2, 2))
    assert found.order == "twice" and found.total == pytest.approx(exact.total, abs=0.02)
    with pytest.raises(ValueError, match="method: only linear corruptions in a named order"):
        information_report(None, twice, 3, 0.0, covariance, (1, 2, 2), method="exact")


def test_two_frames_have_no_gain():
    report = information_report(GaussianBlur(1.0), "star", 2, 0.3, torch.eye(4), (1, 2, 2))
    assert report.gain == 0 and report.first == report.last == report.total


def test_tables_have_a_line_for_each_report():
    reports = [information_report(GaussianBlur(1.0), order, 3, 0.3, torch.eye(4), (1, 2, 2)) for order in ORDERS]
    lines = InformationReport.table(reports).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert [line.split()[0] for line in lines] == ["order", *ORDERS]
    assert str(reports[1]).splitlines()[1].split() == lines[2].split()


def test_more_noise_tells_less():
    totals = [
        information_report(GaussianBlur(1.0), "star", 4, noise, torch.eye(9), (1, 3, 3)).total
        for noise in (0.1, 0.3, 1)
    ]
    assert totals[0] > totals[1] > totals[2] > 0


def report(**changes) -> InformationReport:
    """A report, but for some arguments."""
    usual = {
        "corruption": GaussianBlur(1.0),
        "order": "star",
        "num_frames": 3,
        "noise": 0.3,
        "covariance": torch.eye(4),
        "image_shape": (1, 2, 2),
    }
    return information_report(**usual | changes)


IMAGES = torch.rand(10, 1, 2, 2)
BAD = {
    "one frame": ({"num_frames": 1}, ValueError, "num_frames: expected at least 2, got 1"),
    "no noise": ({"noise": 0.0}, ValueError, "noise: expected some in every direction"),
    "no noise, no loss": ({"noise": 0.0, "corruption": Downsample(2)}, ValueError, "noise: expected some in every"),
    "negative noise": ({"noise": -1.0}, ValueError, "noise: expected a finite number that is not negative"),
    "neither": ({"covariance": None}, ValueError, "covariance: expected either it or images, got neither"),
    "both": ({"images": IMAGES}, ValueError, "covariance: expected either it or images, got both"),
    "no shape": ({"image_shape": None}, ValueError, r"image_shape: expected \(C, H, W\), got None"),
    "a flat shape": ({"image_shape": (4,)}, ValueError, r"image_shape: expected \(C, H, W\)"),
    "another shape": ({"image_shape": (1, 2, 3)}, ValueError, r"covariance: expected finite numbers, \(6, 6\)"),
    "another shape of images": (
        {"images": IMAGES, "covariance": None, "image_shape": (2, 2, 1)},
        ValueError,
        r"images: expected at least two of shape \(2, 2, 1\)",
    ),
    "one image": ({"images": IMAGES[:1], "covariance": None}, ValueError, "images: expected at least two"),
    "images of NaN": ({"images": IMAGES * math.nan, "covariance": None}, ValueError, "images: expected finite pixels"),
    "a covariance of NaN": ({"covariance": torch.eye(4) * math.nan}, ValueError, "covariance: expected finite numbers"),
    "a skew covariance": ({"covariance": torch.eye(4).cumsum(0)}, ValueError, "covariance: expected a symmetric"),
    "a negative covariance": ({"covariance": -torch.eye(4)}, ValueError, "covariance: expected no negative eigenvalue"),
    "an integer covariance": ({"covariance": torch.eye(4).long()}, TypeError, "covariance: expected a floating"),
    "a negative ridge": ({"ridge": -1.0}, ValueError, "ridge: expected a finite number that is not negative"),
    "another method": ({"method": "guess"}, ValueError, "method: expected one of auto, exact, sample"),
    "another order": ({"order": "moon"}, ValueError, "order: expected one of"),
    "no corruption": ({"corruption": None}, TypeError, "corruption: expected a Corruption"),
    "an exact report of masks": (
        {"corruption": Mask(0.1), "method": "exact"},
        ValueError,
        "method: only linear corruptions in a named order",
    ),
    "masks that leave nothing": ({"corruption": Mask(0.9)}, ValueError, "rates: expected masks that leave a pixel"),
    "another schedule": ({"corruption": GaussianBlur([0.0, 1.0])}, ValueError, "sigmas: .* 3 frames, got 2"),
    "few draws": (
        {"method": "sample", "num_samples": 12},
        ValueError,
        "num_samples: expected more than the 12 numbers of a video, got 12",
    ),
    "few images": (
        {"images": IMAGES, "covariance": None, "method": "sample"},
        ValueError,
        "num_samples: expected more than the 12 numbers of a video, got 10",
    ),
    "an estimate of images that never vary": (
        {"covariance": torch.zeros(4, 4), "method": "sample"},
        ValueError,
        "ridge: expected images that vary in every direction",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=list(BAD))
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        report(**changes)


@pytest.mark.cuda
@pytest.mark.parametrize("order", ORDERS)
def test_the_gpu_reports_the_same(order):
    expected, found = report(order=order), report(order=order, covariance=torch.eye(4, device="cuda"))
    assert found.total == pytest.approx(expected.total, abs=1e-9)
    estimate = report(order=order, covariance=torch.eye(4, device="cuda"), corruption=Mask(0.1), generator=seeded())
    assert estimate.total > 0
