"Retrieval metrics against the recorded published program and a naive loop; clustering scores; trials."
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from vireid_nb.evaluation import (
    RetrievalMetrics,
    average_metrics,
    clustering_scores,
    evaluate_llcm,
    evaluate_regdb,
    evaluate_sysu,
    evaluate_trials,
    per_query_metrics,
    pseudo_label_scores,
)
from vireid_nb.records import FeatureBank, PseudoLabels, VireidError, seeded

GOLDEN = Path(__file__).parent / "golden"
EVALUATE = dict(sysu=evaluate_sysu, llcm=evaluate_llcm, regdb=lambda d, q, g, qc, gc: evaluate_regdb(d, q, g))


def naive(dist, q_pids, g_pids, q_cams, g_cams, protocol):
    "Query by query, with the published programs' running precision over the whole list."
    curves, aps, inps, firsts = [], [], [], []
    for d, p, c in zip(dist, q_pids, q_cams):
        order = np.argsort(d, kind="stable")
        hide = np.zeros(len(d), bool)
        if protocol == "sysu":
            hide = (c == 3) & (g_cams[order] == 2)
        elif protocol == "llcm":
            hide = (g_pids[order] == p) & (g_cams[order] == c)
        ids = g_pids[order][~hide]
        match = ids == p
        if not match.any():
            firsts.append(np.nan)
            continue
        precision = np.array([n / (i + 1) for i, n in enumerate(match.cumsum())])
        aps.append(precision[match].mean())
        inps.append(precision[match][-1])
        seen = ids
        if protocol != "regdb":
            seen = np.array([ids[i] for i in sorted(np.unique(ids, return_index=True)[1])])
        firsts.append(int(np.argmax(seen == p)) + 1)
        curve = (seen == p).cumsum()[:20] > 0
        curves.append(np.pad(curve, (0, 20 - len(curve)), mode="edge"))
    return SimpleNamespace(cmc=np.mean(curves, 0), mAP=np.mean(aps), mINP=np.mean(inps), n_without_match=len(dist) - len(aps), first_rank=np.array(firsts))


@pytest.mark.parametrize("name", [f"{p}_{k}" for p in ("sysu", "regdb") for k in (0, 1, 2, 3, "short")])
def test_equals_published(name):
    z = np.load(GOLDEN / f"d_eval_{name}.npz")
    got = evaluate_sysu(z["distmat"], z["q_ids"], z["g_ids"], z["q_cams"], z["g_cams"]) if "sysu" in name else evaluate_regdb(z["distmat"], z["q_ids"], z["g_ids"])
    assert got.cmc.shape == z["cmc"].shape
    np.testing.assert_allclose(got.cmc, z["cmc"], atol=1e-6)
    assert abs(got.mAP - z["mAP"]) < 1e-6 and abs(got.mINP - z["mINP"]) < 1e-6
    if "n_query_without_match" in z:
        assert got.n_without_match == z["n_query_without_match"]
    assert got.n_queries == len(z["q_ids"])


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(sorted(EVALUATE)), st.integers(1, 40), st.integers(1, 60), st.integers(1, 40), st.integers(0, 3), st.sampled_from([np.float32, np.float64]))
def test_equals_naive_with_ties(seed, protocol, n_q, n_g, n_ids, decimals, dtype):
    rng = seeded(seed)
    case = rng.normal(size=(n_q, n_g)).round(decimals).astype(dtype), rng.integers(0, n_ids, n_q), rng.integers(0, n_ids, n_g), rng.integers(1, 7, n_q), rng.integers(1, 7, n_g)
    table = per_query_metrics(*case, protocol=protocol)
    if not table.n_matches.any():
        with pytest.raises(VireidError, match="has a match"):
            EVALUATE[protocol](*case)
        return
    got, want = EVALUATE[protocol](*case), naive(*case, protocol)
    np.testing.assert_allclose(got.cmc, want.cmc[: len(got.cmc)], atol=1e-12)
    np.testing.assert_allclose([got.mAP, got.mINP], [want.mAP, want.mINP], atol=1e-12)
    np.testing.assert_array_equal(table.first_rank, want.first_rank)
    assert got.n_without_match == want.n_without_match == int(table.ap.isna().sum())
    assert abs(got.cmc[-1] - 1) < 1e-12 or len(got.cmc) == 20


def test_blocks_do_not_matter():
    rng = seeded(1)
    case = rng.normal(size=(700, 900)).astype(np.float32), rng.integers(0, 50, 700), rng.integers(0, 50, 900), rng.integers(1, 7, 700), rng.integers(1, 7, 900)
    whole = per_query_metrics(*case)
    one = [per_query_metrics(case[0][i : i + 1], case[1][i : i + 1], case[2], case[3][i : i + 1], case[4]) for i in (0, 144, 145, 699)]
    for i, table in zip((0, 144, 145, 699), one):
        np.testing.assert_array_equal(whole.iloc[i], table.iloc[0])


def test_torch_and_lists_are_welcome():
    d = torch.tensor([[0.1, 0.2], [0.3, 0.1]])
    a = evaluate_sysu(d, torch.tensor([0, 1]), [0, 1], [3, 3], torch.tensor([1, 4]))
    assert a.rank(1) == 1.0 and isinstance(a.mAP, float)
    assert evaluate_regdb(d.double().numpy() * -1, [0, 1], [0, 1]).rank(1) == 0.0
    assert evaluate_regdb((d * 10).int(), [0, 1], [0, 1]).rank(1) == 1.0


def test_camera_three_loses_camera_two_only():
    d, g = np.array([[0.1, 0.2, 0.3]], np.float32), [5, 6, 5]
    assert evaluate_sysu(d, [5], g, [3], [2, 1, 4]).rank(1) == 0.0
    for camera in (1, 2, 4, 5, 6):
        assert evaluate_sysu(d, [5], g, [camera], [2, 1, 4]).rank(1) == 1.0
    with pytest.raises(VireidError, match="none of 1 queries"):
        evaluate_sysu(d, [5], g, [3], [2, 1, 2])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dist=np.full((2, 3), np.nan, np.float32)), "NaN"),
        (dict(dist=np.zeros((0, 3), np.float32), q_pids=[], q_camids=[]), "at least one"),
        (dict(q_pids=[0]), "2 values are needed"),
        (dict(g_camids=[1]), "3 values are needed"),
        (dict(q_pids=[0, -1]), "negative"),
        (dict(q_pids=[8, 9]), "none of 2 queries"),
    ],
)
def test_refused(change, message):
    case = dict(dist=np.zeros((2, 3), np.float32), q_pids=[0, 1], g_pids=[0, 1, 1], q_camids=[3, 6], g_camids=[1, 1, 1])
    with pytest.raises(VireidError, match=message):
        evaluate_sysu(**case | change)


def test_average_and_rank():
    a, b = (RetrievalMetrics(np.array(c), m, m, 10, 1) for c, m in (([0.2, 1.0], 0.3), ([0.4, 0.6, 1.0], 0.5)))
    mean, spread = average_metrics([a, b])
    np.testing.assert_allclose(mean.cmc, [0.3, 0.8, 1.0])
    assert (mean.n_queries, mean.n_without_match) == (20, 2)
    assert abs(mean.mAP - 0.4) < 1e-12 and abs(spread["mAP"] - 0.1) < 1e-12 and abs(spread["rank1"] - 0.1) < 1e-12
    assert "30.00%" in mean._repr_html_()
    with pytest.raises(VireidError):
        RetrievalMetrics(np.ones(20), 1, 1, 1, 0).rank(21)


def _bank(seed=0):
    rng = seeded(seed)
    pids, camid = np.repeat(np.arange(25), 6), np.tile([0, 1, 2, 3, 4, 5], 25)
    f = rng.normal(size=(25, 16))[pids] + rng.normal(size=(150, 16))
    return FeatureBank(f / np.linalg.norm(f, axis=1, keepdims=True), np.isin(camid, [2, 5]).astype(int), camid, np.arange(150)), pids


@pytest.mark.parametrize("protocol", sorted(EVALUATE))
def test_trials_equal_single_evaluations(protocol):
    bank, pids = _bank()
    rng = seeded(3)
    ir, vis = np.flatnonzero(bank.modality == 1), np.flatnonzero(bank.modality == 0)
    trials = [SimpleNamespace(name="a", query=ir, gallery=np.sort(rng.choice(vis, 60, replace=False))) for _ in range(4)]
    trials += [SimpleNamespace(name="b", query=rng.choice(vis, 40, replace=False), gallery=ir) for _ in range(2)]  # queries differ
    result = evaluate_trials(bank, pids, trials, protocol)
    assert list(result) == ["a", "b"] and [r["trials"] for r in result.values()] == [4, 2]
    cam = bank.camid + (protocol == "sysu")
    for name, r in result.items():
        each = [EVALUATE[protocol](-bank.features[t.query] @ bank.features[t.gallery].T, pids[t.query], pids[t.gallery], cam[t.query], cam[t.gallery]) for t in trials if t.name == name]
        mean, spread = average_metrics(each)
        np.testing.assert_allclose(r["mean"].cmc, mean.cmc, atol=1e-12)
        assert abs(r["mean"].mAP - mean.mAP) < 1e-6 and abs(r["spread"]["mAP"] - spread["mAP"]) < 1e-6
    shuffled = bank.take(rng.permutation(len(bank)))
    assert evaluate_trials(shuffled, pids, trials, protocol)["a"]["mean"].mAP == result["a"]["mean"].mAP
    assert evaluate_trials(bank, pids, [], protocol) == {}
    with pytest.raises(VireidError):
        evaluate_trials(bank.take(ir), pids, trials, protocol)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 10), st.integers(1, 10))
def test_clustering_scores(seed, n, k, p):
    rng = seeded(seed)
    labels, pids = rng.integers(-1, k, n), rng.integers(0, p, n)
    s = clustering_scores(labels, pids)
    assert abs(s["ari"] - adjusted_rand_score(pids, labels)) < 1e-12  # scikit-learn sees -1 as one group, as the published program does
    want = sum(np.bincount(pids[labels == c]).max() for c in set(labels[labels >= 0])) / n
    assert abs(s["purity"] - want) < 1e-12
    assert s["n_clusters"] == len(set(labels[labels >= 0])) and abs(s["noise"] - (labels < 0).mean()) < 1e-12


def test_throwing_samples_away_does_not_pay():
    truth = np.repeat(np.arange(20), 10)
    shares = [clustering_scores(np.where(np.arange(200) % 10 < kept, truth, -1), truth) for kept in (10, 7, 4, 2)]
    for score in ("ari", "nmi", "purity"):
        values = [s[score] for s in shares]
        assert values[0] == pytest.approx(1) and values == sorted(values, reverse=True)
    assert all(s["ari_clustered"] == 1 for s in shares)


def test_pseudo_label_scores():
    pids, modality = np.array([0, 0, 1, 1, 0, 0, 1, -1]), np.repeat([0, 1], 4)
    labels = PseudoLabels(visible=[0, 0, 1, 1], infrared=[0, 0, 1, 1], joint=[0, 0, 1, -1, 0, 0, 1, 1], modality=modality)
    s = pseudo_label_scores(labels, pids)
    assert s["ari_visible"] == s["ari_infrared"] == 1 and s["ari_all"] == s["ari_joint"] < 1 and s["n_mixed"] == 2
    assert pseudo_label_scores(labels, pids, matched=labels.intra)["ari_all"] == 1
    assert np.isnan(pseudo_label_scores(labels, np.full(8, -1))["ari_all"])
