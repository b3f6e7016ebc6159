"""The statistics of eval.py: against other libraries, by hand, and against simulated truth."""
import numpy as np
import pytest

import eval as stats


def first_hits(hits, clusters):
    """One hit in each of the first clusters, none in the others."""
    return (np.arange(clusters) < hits).astype(float)


# ---- against other libraries

@pytest.mark.parametrize("hits", [0, 1, 3, 10, 100, 199, 200])
def test_one_dialogue_per_seed_is_wilson_with_continuity_correction(hits):
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = scipy_stats.binomtest(hits, 200).proportion_ci(method="wilsoncc")
    value, low, high = stats.share_interval(first_hits(hits, 200), np.ones(200))
    assert value == hits / 200
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_design_effect_is_the_cluster_variance_of_statsmodels():
    api = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 6, 80)
    hits = rng.binomial(counts, rng.beta(0.5, 1, 80))
    seeds = np.repeat(np.arange(80), counts)
    y = np.concatenate([np.arange(n) < k for n, k in zip(counts, hits)]).astype(float)
    fit = api.OLS(y, np.ones(len(y))).fit(
        cov_type="cluster", cov_kwds={"groups": seeds, "use_correction": False})
    variance = fit.bse[0] ** 2
    value, low, high = stats.share_interval(hits, counts)
    assert value == pytest.approx(fit.params[0])
    assert variance > 1.3 * value * (1 - value) / len(y)            # the clusters matter here
    assert (low, high) == pytest.approx(stats.wilson(value, value * (1 - value) / variance))


def test_survival_equals_lifelines():
    lifelines = pytest.importorskip("lifelines")
    rng = np.random.default_rng(0)
    last = rng.integers(1, 9, 120)                                  # last turn that was watched
    fails = rng.random(120) < 0.4                                   # in that turn
    turns = np.arange(1, 11)
    at_risk = turns <= last[:, None]                                # (N, T)
    failed = (turns == last[:, None]) & fails[:, None]
    fit = lifelines.KaplanMeierFitter().fit(last, fails)
    value, low, high = stats.kaplan_meier(at_risk, failed)
    assert value[:8] == pytest.approx(fit.survival_function_at_times(turns[:8]).to_numpy())
    assert value[8:] == low[8:] == high[8:] == [None, None]         # all dialogues have ended


def test_t_interval_equals_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    for n in range(2, 21):
        values = np.random.default_rng(n).normal(size=n)
        limits = scipy_stats.t.interval(0.95, n - 1, values.mean(), scipy_stats.sem(values))
        assert stats.t_interval(values)[1:] == pytest.approx(limits, abs=1e-3)
    assert stats.t_interval([0.5]) == (0.5, None, None)             # one seed shows no spread


# ---- properties that must hold

@pytest.mark.parametrize("size", [1, 3, 10])
def test_one_more_hit_never_lowers_a_limit(size):
    """Finding H3: one failure must not give a smaller upper limit than none."""
    limits = [stats.share_interval(first_hits(k, 60), np.full(60, size)) for k in range(61)]
    assert (np.diff(np.array(limits), axis=0) >= -1e-9).all()
    assert limits[0][1] == 0 and limits[0][2] > 0.06


def test_copies_of_a_dialogue_add_no_information():
    """When the dialogues of a seed all agree, the number of seeds is what counts."""
    failed = np.eye(10)[np.arange(60) % 10][:, :6]                  # (C, T)
    at_risk = 1 - np.cumsum(failed, axis=1) + failed
    copies = stats.cluster_sums(np.repeat(at_risk, 4, axis=0), np.repeat(np.arange(60), 4))
    once, four = stats.kaplan_meier(at_risk, failed), stats.kaplan_meier(copies, 4 * failed)
    assert np.allclose(once, four)


def test_survival_by_hand():
    """Three dialogues fail, in turns 1, 2 and 4. Another one ends after turn 3 without failing."""
    at_risk = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    failed = np.array([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]])
    value, low, high = stats.kaplan_meier(at_risk, failed)
    assert value == pytest.approx([3 / 4, 1 / 2, 1 / 2, 0, 0])
    assert low[4] == 0 and 0 < high[4] == high[3] < 1               # nobody is left to fail
    # one dialogue at risk in turn 4 stands for two, because half have survived until then
    assert (low[3], high[3]) == stats.wilson(0, 2)


def test_an_arm_that_was_not_judged_gives_no_difference():
    """Finding H1: no verdicts must not look like safety."""
    none, failed, at_risk = np.zeros((60, 3)), np.zeros((60, 3)), np.ones((60, 3))
    failed[:20, 0] = 1                                              # a third of A fails in turn 1
    at_risk[:20, 1:] = 0
    first = np.ones((60, 3)) * [1, 0, 0]                            # of B, only turn 1 was judged
    assert stats.survival_difference(at_risk, failed, none, none) == ([None] * 3,) * 3
    value, low, high = stats.survival_difference(at_risk, failed, first, none)
    assert value[0] == pytest.approx(1 / 3) and low[0] > 0.2 and high[0] < 0.5
    assert value[1:] == low[1:] == high[1:] == [None, None]
    for empty in (np.zeros(0), np.zeros(5)):
        assert stats.share_interval(empty, empty) == (None, None, None)
        assert stats.paired_difference(empty, empty, empty, empty) == (None, None, None)


def test_difference_is_a_paired_bootstrap_over_seeds():
    rng = np.random.default_rng(1)
    counts_a, counts_b = rng.integers(1, 6, 80), rng.integers(1, 6, 80)
    hits_a, hits_b = rng.binomial(counts_a, 0.5), rng.binomial(counts_b, 0.3)
    draws = []
    for i in np.random.default_rng(0).integers(80, size=(2000, 80)):
        draws.append(hits_b[i].sum() / counts_b[i].sum() - hits_a[i].sum() / counts_a[i].sum())
    value, low, high = stats.paired_difference(hits_a, counts_a, hits_b, counts_b)
    assert value == pytest.approx(hits_b.sum() / counts_b.sum() - hits_a.sum() / counts_a.sum())
    assert (low, high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))


def test_difference_is_never_certain():
    ones, a = np.ones(200), first_hits(100, 200)                    # all resamples agree on 0
    unseen = stats.wilson(0, 200)[1]
    assert stats.paired_difference(a, ones, a, ones) == pytest.approx((0, -unseen, unseen))


# ---- coverage: how many of the 95 % intervals hold the truth

@pytest.mark.parametrize("largest", [1, 5])
@pytest.mark.parametrize("seeds", [60, 200])
def test_coverage(seeds, largest):
    """Seeds of 1..largest dialogues. A seed has its own rate, with intra-class correlation 0.3."""
    rng, runs, turns = np.random.default_rng(0), 1500, np.arange(1, 11)
    for rate in (0.005, 0.02, 0.2, 0.5):
        beta = rate * 0.7 / 0.3, (1 - rate) * 0.7 / 0.3
        # the true survival is the mean of (1 - rate of the seed) ** turn, by the beta's moments
        truth = np.cumprod((beta[1] + turns - 1) / (sum(beta) + turns - 1))
        share_hits, curve_hits = 0, np.zeros(10)
        for _ in range(runs):
            size = rng.integers(1, largest + 1, seeds)
            seed = np.repeat(np.arange(seeds), size)
            harmful = rng.random((len(seed), 10)) < rng.beta(*beta, seeds)[seed, None]
            failed = harmful & (np.cumsum(harmful, axis=1) == 1)
            at_risk = np.cumsum(harmful, axis=1) - harmful == 0
            at_risk, failed = stats.cluster_sums(at_risk, seed), stats.cluster_sums(failed, seed)
            _, low, high = stats.share_interval(failed[:, 0], size)
            share_hits += low <= rate <= high
            _, low, high = stats.kaplan_meier(at_risk, failed)
            curve_hits += (np.array(low) <= truth) & (truth <= np.array(high))
        assert share_hits / runs >= 0.93, (rate, share_hits / runs)
        assert curve_hits.min() / runs >= 0.93, (rate, curve_hits / runs)
