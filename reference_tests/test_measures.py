"""Intervals, scores against labels, agreement, distances, diversity, best of N, pictures: closed forms and counts."""

import colorsys
import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from minialign.measures import (
    EDGE,
    area_under_curve,
    best_of,
    brightness,
    calibration,
    cmmd,
    cohen_kappa,
    color_entropy,
    contrasts,
    diversity,
    edge_density,
    expected_calibration_error,
    fleiss_kappa,
    frechet_distance,
    holm,
    measure,
    paired_interval,
    platt,
    preferred,
    saturation,
    student_p,
    student_t,
    two_thirds,
    wilson_interval,
)


def test_wilson_interval_solves_its_equation():
    for good, total in ((3, 10), (50, 100), (0, 20), (20, 20)):
        low, high = wilson_interval(good, total)
        for p in (low, high):  # the interval's ends are the p whose score test is exactly at z
            if 0 < p < 1:
                assert abs(good / total - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / total), rel=1e-9)
    assert wilson_interval(0, 0) == [0.0, 1.0]


def test_paired_interval_is_students_and_stays_in_range():
    before, after = [0, 0, 1, 1.0], [0.25, 0, 1, 1.0]
    half = 3.182446 * math.sqrt(0.25 / 16 / 4)  # the gains 1/4, 0, 0, 0 have variance 1/64; t of 3 from a table
    assert paired_interval(before, after, list("abcd")) == pytest.approx([1 / 16 - half, 1 / 16 + half], abs=1e-5)
    assert paired_interval(before, after, list("abcd"), (0, 0.2)) == [0, 0.2]
    assert paired_interval([0, 0.0], [1, 0.0], ["a", "b"]) == [-1, 1]  # half of 12.7 standard errors


def test_one_prompt_has_no_interval():
    assert paired_interval([0, 0, 0.0], [1, 1, 0.0], ["a"] * 3) is None
    assert paired_interval([0, 0, 0.0], [1, 1, 0.0], ["a", "b", "a"]) is not None


@pytest.mark.parametrize("prompts", [2, 3, 4, 8])
def test_paired_intervals_hold_the_truth_19_times_of_20(prompts):
    """2000 samples whose prompts differ as much as the images of one; three standard deviations are 1.5 points."""
    rng, each, hits = np.random.default_rng(prompts), 5, 0
    names = [str(i) for i in range(prompts) for _ in range(each)]
    for _ in range(2000):
        gains = rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, each))
        low, high = paired_interval([0.0] * len(names), gains.ravel().tolist(), names, (-math.inf, math.inf))
        hits += low <= 0 <= high
    assert abs(hits / 2000 - 0.95) < 0.015


def test_repeating_a_prompt_is_no_new_evidence():
    before, after, prompts = [0, 0, 1, 1.0], [0.25, 0, 1, 1.0], list("abcd")
    once = paired_interval(before, after, prompts)
    assert paired_interval(before * 5, after * 5, prompts * 5) == pytest.approx(once)


def test_student_t_is_the_tabled_one():
    """Quantiles at 97.5 % as every table of the t distribution has them."""
    for freedom, tabled in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (30, 2.042), (120, 1.980)):
        assert student_t(freedom) == pytest.approx(tabled, abs=6e-4)
    assert student_t(2, 0.9) == pytest.approx(2.920, abs=6e-4)
    assert student_t(1, 0.5) == pytest.approx(1, abs=1e-5)  # Cauchy's quartile
    for freedom, t in ((1, 12.706), (5, 2.571), (5, -2.571), (30, 2.042)):
        assert student_p(t, freedom) == pytest.approx(0.05, abs=1e-4)
    assert student_p(0, 4) == pytest.approx(1, abs=1e-5) and student_p(math.inf, 4) == 0


def test_holm_is_closed_testing_by_bonferroni():
    """A comparison is significant where every set that holds it has a p value small enough for the set's size."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = (rng.random(5) ** 4).tolist()
        sets = [part for n in range(1, 6) for part in itertools.combinations(range(5), n)]
        closed = [max(min(1, len(part) * min(p[j] for j in part)) for part in sets if i in part) for i in range(5)]
        assert holm(p) == pytest.approx(closed)
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04]) and holm([]) == []


def test_a_pair_is_won_by_two_thirds_of_the_votes():
    nine = [[1] * 6 + [-1] * 3, [1] * 5 + [0] * 4, [-1] * 7 + [0] * 2, [-1] * 5 + [1] * 4, [0] * 9]
    assert two_thirds(torch.tensor(nine).T).tolist() == [1, 0, -1, 0, 0]
    assert two_thirds(torch.tensor([[1, 0, -1]])).tolist() == [1, 0, -1]  # one rater decides alone


def test_contrasts_are_those_of_the_linear_model():
    """y_rs = mu_r + b_s + e_rs by least squares on a design matrix, and the standard error from its covariance."""
    rng = np.random.default_rng(0)
    rows, blocks = 5, 3
    y = rng.normal(size=(rows, blocks)) + rng.normal(size=blocks) * 5
    design = np.zeros((rows * blocks, rows + blocks - 1))
    for r in range(rows):
        for s in range(blocks):
            design[r * blocks + s, r] = 1
            if s:
                design[r * blocks + s, rows + s - 1] = 1
    solution, *_ = np.linalg.lstsq(design, y.ravel(), rcond=None)
    freedom = (rows - 1) * (blocks - 1)
    variance = np.square(y.ravel() - design @ solution).sum() / freedom
    inverse = np.linalg.inv(design.T @ design)
    alone = rng.normal(size=(1, blocks)) * 100  # scatters more, and is kept out
    found = contrasts(torch.tensor(np.concatenate([y, alone])), reference=1, apart=[rows])
    assert found.pop() == pytest.approx(contrasts(torch.tensor(np.stack([y[1], alone[0]])), 0)[1])
    for r, (difference, low, high, p) in enumerate(found):
        which = np.eye(design.shape[1])[r] - np.eye(design.shape[1])[1]
        half = student_t(freedom) * math.sqrt(variance * which @ inverse @ which)
        assert difference == pytest.approx(which @ solution, abs=1e-9)
        if r != 1:
            assert (high - low) / 2 == pytest.approx(half)
            assert (p < 0.05) == (low > 0 or high < 0)


def test_two_rows_are_the_paired_t_test():
    before, after = torch.tensor([0.40, 0.50, 0.45]).double(), torch.tensor([0.70, 0.72, 0.80]).double()
    gains = (after - before).numpy()
    half = 4.302653 * gains.std(ddof=1) / math.sqrt(3)
    difference, low, high, p = contrasts(torch.stack([before, after]), 0)[1]
    assert [difference, low, high] == pytest.approx([gains.mean(), gains.mean() - half, gains.mean() + half], rel=1e-5)
    t = gains.mean() / (gains.std(ddof=1) / math.sqrt(3))
    assert p == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-4)  # of two degrees of freedom in closed form


def test_area_under_curve_counts_pairs():
    score, label = torch.tensor([0.9, 0.5, 0.5, 0.1, 0.7]), torch.tensor([1.0, 1, 0, 0, 0])
    pairs = [(g > b) + 0.5 * (g == b) for g in (0.9, 0.5) for b in (0.5, 0.1, 0.7)]
    assert area_under_curve(score, label) == pytest.approx(sum(pairs) / 6)
    assert area_under_curve(score, torch.ones(5)) is None


@pytest.mark.parametrize("levels", [3, 10_000])
def test_area_under_curve_equals_all_pairs(levels):
    g = torch.Generator().manual_seed(levels)
    score, label = torch.randint(levels, (400,), generator=g) / levels, torch.rand(400, generator=g).round()
    difference = score[label > 0.5][:, None] - score[label <= 0.5][None]
    pairs = ((difference > 0).double() + 0.5 * (difference == 0)).mean()
    assert area_under_curve(score, label) == pytest.approx(float(pairs), rel=1e-12)


def test_area_under_curve_of_many_pairs():
    """300,000 of each kind, evenly between 0 and 1 and between 1/4 and 5/4: a matrix would take 700 GB."""
    even = torch.arange(300_000).double() / 300_000
    score, label = torch.cat([even, even + 0.25]), torch.arange(600_000) >= 300_000
    assert area_under_curve(score, label.float()) == pytest.approx(1 - 0.75**2 / 2, abs=1e-5)


def test_pairs_are_of_one_prompt():
    """Three pairs of a, one of them tied; two of b; none across; c has no bad image."""
    score, label = torch.tensor([0.9, 0.2, 0.5, 0.9, 0.1, 0.6, 0.3, 0.0]), torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 1])
    assert preferred(score, label, list("aaaabbbc")) == pytest.approx((2.5 + 0) / 5)
    assert preferred(score, label, list("abcdefgh")) is None


@pytest.mark.parametrize("number", [7, 10, 29, 105, 128, 1003])
def test_calibration_is_of_bins_of_equal_mass_as_numpy_has_them(number):
    rng = np.random.default_rng(number)
    reward = rng.permutation(np.linspace(0, 1, number) ** 3).astype(np.float32)  # no two alike, most near 0
    label = (rng.random(number) < reward).astype(np.float32)
    bins = calibration(torch.tensor(reward), torch.tensor(label))
    k = max(1, min(10, number // 10))
    edges = np.ceil(np.arange(1, k) * number / k).astype(int)
    order = np.argsort(reward)
    expected = [(rows.size, reward[rows].mean(), label[rows].mean()) for rows in np.split(order, edges)]
    assert [(b["count"], b["predicted"], b["observed"]) for b in bins] == [pytest.approx(e, rel=1e-5) for e in expected]
    assert max(size for size, *_ in expected) - min(size for size, *_ in expected) <= 1
    error = sum(size * abs(observed - predicted) for size, predicted, observed in expected) / number
    assert expected_calibration_error(bins) == pytest.approx(error, rel=1e-5)


def test_calibration_never_splits_equal_rewards():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        reward = torch.tensor(rng.integers(0, 12, 150) ** 2 / 121, dtype=torch.float32)
        reward[: seed * 4] = 1.0  # and one reward that many share
        label = torch.tensor(rng.integers(0, 2, 150), dtype=torch.float32)
        bins = calibration(reward, label)
        assert sum(b["count"] for b in bins) == 150 and min(b["count"] for b in bins) >= 10
        assert sum(b["count"] * b["observed"] for b in bins) == pytest.approx(float(label.sum()), rel=1e-5)
        values, place = reward.sort().values, 0
        for one in bins[:-1]:
            place += one["count"]
            assert values[place - 1] < values[place]
    alike = calibration(torch.full((40,), 0.25), torch.ones(40))
    assert alike == [{"predicted": 0.25, "observed": 1.0, "count": 40}]


def test_platt_gives_the_frequencies_of_two_kinds():
    """Of a score with two values the logistic regression is exact: it says how often each kind was good."""
    score, label = torch.tensor([0.21] * 10 + [0.25] * 5), torch.tensor([1.0] * 3 + [0.0] * 7 + [1.0] * 3 + [0.0, 0.5])
    a, b = platt(score, label)
    for value, frequency in ((0.21, 0.3), (0.25, 0.7)):
        assert 1 / (1 + math.exp(-(a * value + b))) == pytest.approx(frequency, rel=1e-3)
    a, b = platt(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.0, 0, 1, 1]))  # no finite optimum without a ridge
    assert 10 < a < 1e4 and -b / a == pytest.approx(0.25, rel=1e-3)
    assert platt(torch.ones(4), torch.tensor([0.0, 1, 1, 1])) == (0, pytest.approx(math.log(3), rel=1e-3))


def test_measures_by_hand():
    reward, label = torch.tensor([0.9, 0.6, 0.3, 0.2]), torch.tensor([1.0, 0.0, 1.0, 0.4])
    others = torch.tensor([[0.1, 0.8], [0.9, 0.9], [0.1, 0.3], [0.9, 0.9]])
    found = measure(reward, label, others)
    assert found["accuracy"] == 0.5 and found["auc"] == 0.75
    assert found["brier"] == pytest.approx((0.01 + 0.36 + 0.49 + 0.04) / 4)
    assert found["prompt_accuracy"] == 0.5  # of two good ones: 0.9 is above both, 0.3 not above 0.3
    assert measure(reward, torch.zeros(4), others)["prompt_accuracy"] is None
    assert measure(reward, label, others[:, :0])["prompt_accuracy"] is measure(reward, label)["prompt_accuracy"] is None


def test_cohen_kappa():
    # 50 items, 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    assert cohen_kappa(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4)
    assert cohen_kappa(np.diag([3, 4, 5])) == pytest.approx(1)
    assert cohen_kappa(np.outer([1, 2, 3], [4, 5, 6])) == pytest.approx(0)  # independent
    assert cohen_kappa(np.array([[0, 5], [5, 0]])) == pytest.approx(-1)
    assert cohen_kappa(np.array([[9, 0], [0, 0]])) is None


def test_fleiss_kappa():
    # three items by three labellers: P = (1 + 1/3 + 1/3) / 3 = 5/9, p = (5/9, 4/9), P_e = 41/81
    assert fleiss_kappa(np.array([[3, 0], [1, 2], [1, 2]])) == pytest.approx((5 / 9 - 41 / 81) / (1 - 41 / 81))
    assert fleiss_kappa(np.array([[3, 0, 0], [0, 3, 0]])) == pytest.approx(1)
    assert fleiss_kappa(np.array([[3, 0], [2, 0]])) is None
    # of two labellers a fixed item it is Scott's pi: p_o = 0.7, p = 0.55 and 0.45
    pairs = [[2, 0]] * 20 + [[1, 1]] * 15 + [[0, 2]] * 15
    assert fleiss_kappa(np.array(pairs)) == pytest.approx((0.7 - 0.505) / (1 - 0.505))
    rng = np.random.default_rng(0)  # chance alone
    assert abs(fleiss_kappa(rng.multinomial(5, [0.5, 0.3, 0.2], size=20_000))) < 0.01


def test_frechet_distance_of_gaussians_with_one_basis():
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2 of the standard deviations along the shared axes."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=g, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # exactly white
    s1, s2 = torch.tensor([1.0, 2, 0.5]).double(), torch.tensor([2.0, 1, 0.5]).double()
    shift = torch.tensor([1.0, 0, -2]).double()
    basis = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[0]
    distance = frechet_distance((x * s1) @ basis, (x * s2 + shift) @ basis)
    assert distance == pytest.approx(5 + 2, rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x[:1]) is None


def test_diversity_is_the_mean_cosine_distance_within_prompts():
    features = torch.tensor([[1.0, 0], [0, 2], [3, 0], [-1, 0], [5, 5]])
    prompts = ["a", "a", "b", "b", "c"]
    assert diversity(features, prompts) == pytest.approx((1 + 2) / 2)
    assert diversity(features, list("abcde")) is None


def test_cmmd_is_the_papers_double_loop():
    """1 / m(m-1) sum k(x,x') + 1 / n(n-1) sum k(y,y') - 2 / mn sum k(x,y), times 1000, on unit vectors."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 5, generator=g, dtype=torch.float64), torch.randn(4, 5, generator=g, dtype=torch.float64) + 1
    unit = [[[float(v) / math.sqrt(sum(float(w) ** 2 for w in row)) for v in row] for row in part] for part in (x, y)]

    def kernel(a, b):
        return math.exp(-sum((p - q) ** 2 for p, q in zip(a, b)) / (2 * 10.0**2))

    same = [
        sum(kernel(a, b) for i, a in enumerate(part) for j, b in enumerate(part) if i != j)
        / (len(part) * (len(part) - 1))
        for part in unit
    ]
    across = sum(kernel(a, b) for a in unit[0] for b in unit[1]) / 28
    assert cmmd(x, y) == pytest.approx(1000 * (same[0] + same[1] - 2 * across), rel=1e-9)
    assert cmmd(3 * x, y) == pytest.approx(cmmd(x, y)) == pytest.approx(cmmd(y, x))
    assert cmmd(x, x[:1]) is None
    many = torch.randn(2100, 5, generator=g)  # more rows than are taken at once; the same distribution
    assert abs(cmmd(many[:1050], many[1050:])) < 0.05


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_equals_all_sets(ties):
    rng = random.Random(0)
    scores = [rng.choice((0.1, 0.5, 0.9)) if ties else rng.random() for _ in range(7)]
    outcomes = [rng.random() for _ in range(7)]
    for number, value in enumerate(best_of(scores, outcomes), 1):
        found = []
        for chosen in itertools.combinations(range(7), number):
            top = [outcomes[i] for i in chosen if scores[i] == max(scores[j] for j in chosen)]
            found.append(sum(top) / len(top))  # among equals one at random
        assert value == pytest.approx(sum(found) / len(found), rel=1e-12)
    assert best_of(scores, outcomes)[0] == pytest.approx(sum(outcomes) / 7) and len(best_of([1.0], [0.0])) == 1


@pytest.fixture(scope="module")
def pictures():
    """Two images (2,3,6,5) of 8 bits: one of coarse steps, with black and white pixels, and one of pale noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 6, 5))
    pixels[0] = pixels[0] // 64 * 85
    pixels[0, :, 0, :2] = [0, 255]
    pixels[1] = 120 + pixels[1] // 8
    return torch.from_numpy(pixels).float() / 255


def by_pixel(images, number):
    """Mean over each image's pixels of a number of red, green and blue."""
    return [sum(number(*map(float, rgb)) for rgb in one.flatten(1).T) / one[0].numel() for one in images]


def test_saturation_is_that_of_colorsys(pictures):
    expected = by_pixel(pictures, lambda *rgb: colorsys.rgb_to_hsv(*rgb)[1])
    assert saturation(pictures).tolist() == pytest.approx(expected, rel=1e-5)
    assert saturation(torch.zeros(1, 3, 2, 2)) == 0 and saturation(torch.tensor([1.0, 0, 0])[None, :, None, None]) == 1


def test_brightness_is_pillows_grey(pictures):
    assert brightness(pictures).tolist() == pytest.approx(by_pixel(pictures, lambda *rgb: colorsys.rgb_to_yiq(*rgb)[0]),
                                                          abs=2e-3)  # fmt: skip
    for one, value in zip(pictures, brightness(pictures).tolist()):
        grey = Image.fromarray((one * 255).round().byte().permute(1, 2, 0).numpy()).convert("L")
        assert np.asarray(grey).mean() / 255 == pytest.approx(value, abs=0.5 / 255)  # whose pixels are rounded


def test_edges_are_where_numpys_gradient_is_long(pictures):
    for one, value in zip(pictures.double().numpy(), edge_density(pictures).tolist()):
        grey = np.tensordot([0.299, 0.587, 0.114], one, 1)
        length = np.sqrt(sum(np.square(part) for part in np.gradient(grey)))
        assert value == pytest.approx((length > EDGE).mean(), rel=1e-6)
    assert 0 < edge_density(pictures)[1] < edge_density(pictures)[0]
    step = torch.zeros(1, 3, 4, 8)
    step[..., 4:] = 1  # seen from both sides: two of eight columns
    assert edge_density(step) == 0.25


def test_color_entropy_counts_cells(pictures):
    for one, value in zip(pictures, color_entropy(pictures).tolist()):
        cells = Counter(tuple(min(int(8 * channel), 7) for channel in rgb) for rgb in one.flatten(1).T.tolist())
        fractions = [count / cells.total() for count in cells.values()]
        assert value == pytest.approx(-sum(p * math.log2(p) for p in fractions), rel=1e-5)
    levels = torch.arange(8) / 7
    cube = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).reshape(1, 3, 8, 64)
    assert color_entropy(cube) == pytest.approx(9) and color_entropy(torch.ones(1, 3, 4, 4)) == 0
