"Matching: the published program's labels, naive oracles, scikit-learn's inertia, and every way in which there is nothing to match."
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from vireid_nb import _matching_kernels, matching
from vireid_nb.matching import MatchReport, match_clusters, match_labels, match_report, matching_cost, pairs_agree, pairs_right, sub_memories
from vireid_nb.records import PseudoLabels, VireidError
from vireid_nb.synthetic import make_vi_features

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["more_rgb", "more_ir", "small"]
KINDS = ["auto", "10"]
quick = settings(max_examples=40, deadline=None, derandomize=True)


def load(name):
    return dict(np.load(GOLDEN / f"f_matching_{name}.npz"))


def full(centers):
    "Stacked centres as sub-memories that all exist."
    centers = np.asarray(centers, np.float32)
    return centers, np.ones(centers.shape[:2], bool)


# ---- the published program


def published(g, kind):
    "Its sub-memories, cost and mapping with its defects: last clusters left out, coordinates of a mean where K-means failed."
    stored, sides = iter(g[f"kmeans_centers_ninit_{kind}"]), []
    for m in ("rgb", "ir"):
        x, y = g[f"features_{m}"], g[f"labels_{m}"]
        clusters = [x[y == k] for k in range(y.max())]
        sides.append([next(stored) if len(c) >= 4 else c.mean(0)[:4] for c in clusters])
    cost = np.array([[sum(min(np.linalg.norm(u - w) for u in a) for w in b) for b in sides[1]] for a in sides[0]])
    return sides, cost, cost.argmin(1).tolist() + [len(sides[0])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_with_its_bug_is_the_published_program(name, kind):
    g = load(name)
    mapping = np.array(published(g, kind)[2])
    assert (mapping == g[f"mapping_ninit_{kind}"]).all()
    y = g["labels_rgb"]
    assert (np.where(y >= 0, mapping[y], -1) == g[f"rgb_labels_after_ninit_{kind}"]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_published_rule_on_the_published_centres(name, kind):
    g = load(name)
    sides, cost, mapping = published(g, kind)
    whole = [[k for k, c in enumerate(side) if np.ndim(c) == 2] for side in sides]  # clusters that K-means could split
    ours = matching_cost(*(full([side[k] for k in kept]) for side, kept in zip(sides, whole)), reading="released")
    theirs = cost[np.ix_(*whole)]
    assert np.abs(ours - theirs).max() < 1e-5
    assert (match_clusters(ours, "nearest")[:, 1] == theirs.argmin(1)).all()
    if name != "small":
        assert (match_clusters(ours, "nearest")[:, 1] == mapping[:-1]).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_cluster_is_left_out(name):
    g = load(name)
    sides = [sub_memories(g[f"features_{m}"], g[f"labels_{m}"]) for m in ("rgb", "ir")]
    sizes = [np.bincount(g[f"labels_{m}"][g[f"labels_{m}"] >= 0]) for m in ("rgb", "ir")]
    for (_, mask), size in zip(sides, sizes):
        assert (mask.sum(1) == np.minimum(size, 4)).all()
    for rule in matching.RULES:
        for reading in matching.READINGS:
            check_report(match_report(matching_cost(*sides, reading=reading), rule, reading=reading), len(sizes[0]), len(sizes[1]))


def check_report(report, n_visible, n_infrared):
    "Every cluster is in a pair or alone; a reason is given exactly when one is alone."
    pairs = np.array(report.pairs).reshape(-1, 2)
    assert sorted({*pairs[:, 0].tolist(), *report.alone_visible}) == list(range(n_visible)) and not {*pairs[:, 0].tolist()} & {*report.alone_visible}
    assert sorted({*pairs[:, 1].tolist(), *report.alone_infrared}) == list(range(n_infrared)) and not {*pairs[:, 1].tolist()} & {*report.alone_infrared}
    assert len(report.cost) == len(pairs) and bool(report.why) == bool(report.alone_visible or report.alone_infrared)
    assert len(report.table()) == len(pairs) + len(report.alone_visible) + len(report.alone_infrared)
    assert MatchReport(**report.as_dict()) == report and "<table" in report._repr_html_()
    if report.rule == "hungarian":
        assert len(pairs) == min(n_visible, n_infrared) == len(set(pairs[:, 1]))


# ---- sub-memories


def inertia(x, centers):
    return ((x[:, None] - centers) ** 2).sum(2).min(1).sum()


@pytest.mark.parametrize("per_cluster, dim, noise", [(5, 32, 1.0), (12, 128, 1.0), (30, 512, 1.0), (56, 256, 0.5), (90, 16, 1.0)])
def test_inertia_is_within_a_percent_of_ten_restarts_of_scikit_learn(per_cluster, dim, noise):
    bank, pids = make_vi_features(30, per_cluster, 1, dim=dim, noise=noise, seed=7)
    x, y = bank.visible.features, pids[bank.modality == 0]
    centers, mask = sub_memories(x, y)
    ratio = [inertia(x[y == k], centers[k][mask[k]]) / KMeans(4, n_init=10, random_state=0).fit(x[y == k]).inertia_ for k in range(30)]
    assert max(ratio) < 1.01 and np.mean(ratio) < 1.0001


@given(st.integers(1, 120), st.integers(1, 8), st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6), st.booleans())
@quick
def test_sub_memories_are_means_of_a_partition(n_samples, dim, n, k, seed, copies):
    rng = np.random.default_rng(seed)
    k = min(k, n_samples)
    x = rng.normal(size=(n_samples, dim)).astype(np.float32)
    if copies:
        x = x[rng.integers(0, max(1, n_samples // 3), n_samples)]
    y = rng.permutation(np.r_[np.arange(k), rng.integers(-1, k, n_samples - k)])
    centers, mask = sub_memories(x, y, n, seed)
    assert centers.shape == (k, n, dim) and centers.dtype == np.float32 and mask.shape == (k, n) and mask.dtype == bool
    for c in range(k):
        mine = x[y == c]
        different = len(np.unique(mine, axis=0))
        assert 1 <= mask[c].sum() <= min(n, different) and (centers[c][~mask[c]] == 0).all()
        if not copies and len(mine) <= n:
            assert mask[c].sum() == len(mine) and inertia(mine, centers[c][mask[c]]) < 1e-8
        owner = ((mine[:, None] - centers[c][mask[c]]) ** 2).sum(2).argmin(1)
        if not copies and set(owner) == set(range(mask[c].sum())):  # the mean of the means, weighted, is the cluster's mean
            share = np.bincount(owner) / len(owner)
            assert inertia(mine, np.stack([mine[owner == j].mean(0) for j in range(len(share))])) <= inertia(mine, centers[c][mask[c]]) + 1e-4


def test_a_cluster_does_not_depend_on_the_others_or_on_the_block(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(600, 16)).astype(np.float32), rng.integers(0, 20, 600)
    spread = lambda centers: np.array([inertia(x[y == k], c) for k, c in enumerate(centers)])
    centers, mask = sub_memories(x, y)
    fewer, _ = sub_memories(x, np.where(y < 5, y, -1))
    assert np.abs(spread(fewer) / spread(centers)[:5] - 1).max() < 0.01  # equal but for rounding, and for the order of the memories
    monkeypatch.setattr(_matching_kernels, "BLOCK", 1)
    alone, alone_mask = sub_memories(x, y)
    assert np.abs(spread(alone) / spread(centers) - 1).max() < 0.01 and (alone_mask == mask).all()


def test_more_samples_than_dimensions_and_tensors_give_the_same():
    rng = np.random.default_rng(1)
    narrow = rng.normal(size=(300, 6)).astype(np.float32)
    wide = np.concatenate([narrow, np.zeros((300, 400), np.float32)], 1)  # the same geometry, by way of the Gram matrix
    y = np.repeat([0, 1, 2], 100)
    a, b = sub_memories(narrow, y)[0], sub_memories(torch.from_numpy(wide), torch.from_numpy(y))[0]
    assert all(abs(inertia(narrow[y == k], a[k]) / inertia(narrow[y == k], b[k, :, :6]) - 1) < 0.01 for k in range(3))
    assert (sub_memories(narrow, y)[0] == a).all()


def test_offsets_do_not_cost_digits():
    x = np.random.default_rng(2).normal(size=(80, 5)).astype(np.float32)
    y = np.repeat([0, 1], 40)
    far = sub_memories(x + 1000, y)[0] - 1000
    assert all(abs(inertia(x[y == k], far[k]) / inertia(x[y == k], sub_memories(x, y)[0][k]) - 1) < 0.01 for k in (0, 1))


BAD_FEATURES = [
    (dict(labels=[0, 0, 2]), "no sample has label 1"),
    (dict(labels=[0, 0]), "with labels"),
    (dict(n=0), "n is 0"),
    (dict(features=[[np.nan, 1], [0, 1], [1, 1]]), "NaN"),
    (dict(features=[1.0, 2, 3]), "shape"),
]


@pytest.mark.parametrize("bad, word", BAD_FEATURES)
def test_sub_memories_refuse(bad, word):
    with pytest.raises(VireidError, match=word):
        sub_memories(**{"features": np.eye(3, 2), "labels": [0, 0, 1]} | bad)


# ---- cost


def cost_naive(a, b):
    (a, a_mask), (b, b_mask) = a, b
    one = lambda p, q: a.shape[1] * np.mean([min(np.linalg.norm(u - w) for w in b[q][b_mask[q]]) for u in a[p][a_mask[p]]])
    return np.array([[one(p, q) for q in range(len(b))] for p in range(len(a))])


def some_memories(rng, k, n, dim):
    mask = rng.random((k, n)) < 0.7
    mask[:, 0] = True
    return (rng.normal(size=(k, n, dim)) * mask[:, :, None]).astype(np.float32), mask


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**6), st.booleans())
@quick
def test_cost_is_the_definition(kv, ki, n, dim, seed, tiny_blocks):
    rng = np.random.default_rng(seed)
    v, r = some_memories(rng, kv, n, dim), some_memories(rng, ki, n, dim)
    before = matching.BLOCK
    matching.BLOCK = _matching_kernels.BLOCK = 1 if tiny_blocks else before
    try:
        paper, released = matching_cost(v, r), matching_cost(v, r, reading="released")
    finally:
        matching.BLOCK = _matching_kernels.BLOCK = before
    assert np.abs(paper - cost_naive(v, r)).max() < 1e-5 and np.abs(released - cost_naive(r, v).T).max() < 1e-5


def test_coinciding_memories_cost_nothing_even_far_from_the_origin():
    v = some_memories(np.random.default_rng(3), 6, 4, 64)
    assert np.diag(matching_cost(v, v)).max() < 1e-9
    moved = v[0] + 100, v[1]
    assert np.diag(matching_cost(moved, moved)).max() < 1e-9
    collapsed = full(np.ones((5, 4, 8)))
    assert (matching_cost(collapsed, collapsed) == 0).all()


def test_cost_refuses():
    v = full(np.ones((2, 4, 8)))
    with pytest.raises(VireidError, match="same network"):
        matching_cost(v, full(np.ones((2, 4, 7))))
    with pytest.raises(VireidError, match="reading"):
        matching_cost(v, v, reading="other")


# ---- pairs


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 10**6), st.sampled_from(matching.RULES))
@quick
def test_pairs_are_the_cheapest_and_nobody_is_lost(kv, ki, seed, rule):
    cost = np.random.default_rng(seed).random((kv, ki)).round(1)
    pairs = match_clusters(cost, rule)
    assert pairs.dtype == np.int64 and (pairs[:, 0] == np.unique(pairs[:, 0])).all()
    check_report(match_report(cost, rule), kv, ki)
    if cost.size:
        least = cost[linear_sum_assignment(cost)].sum() if rule == "hungarian" else cost.min(1).sum()
        assert abs(cost[pairs[:, 0], pairs[:, 1]].sum() - least) < 1e-9
    assert (match_clusters(torch.from_numpy(cost), rule) == pairs).all()


@pytest.mark.parametrize("cost, rule, word", [([[np.nan]], "hungarian", "NaN"), ([[np.inf, 1]], "nearest", "infinity"), ([1.0], "hungarian", "shape"), ([[1.0]], "greedy", "hungarian or nearest")])
def test_match_clusters_refuses(cost, rule, word):
    with pytest.raises(VireidError, match=word):
        match_clusters(cost, rule)


# ---- labels


def labelled(n_ids=8, n_visible=6, n_infrared=5, seed=0, shuffle=True):
    "A bank in any row order, with its identities as clusters, numbered differently in the two modalities."
    bank, pids = make_vi_features(n_ids, n_visible, n_infrared, dim=32, modality_gap=0.2, camera_gap=0.2, noise=0.4, seed=seed)
    rng = np.random.default_rng(seed)
    if shuffle:
        order = rng.permutation(len(bank))
        bank, pids = bank.take(order), pids[order]
    names = [rng.permutation(n_ids) for _ in range(2)]
    visible, infrared = (name[pids[bank.modality == m]] for m, name in enumerate(names))
    return bank, pids, PseudoLabels(visible, infrared, np.zeros(len(bank)), bank.modality)


@pytest.mark.parametrize("rule", matching.RULES)
@pytest.mark.parametrize("reading", matching.READINGS)
def test_easy_people_are_found_in_any_row_order(rule, reading):
    bank, pids, labels = labelled()
    matched, report = match_labels(bank, labels, rule=rule, reading=reading)
    assert pairs_right(report, labels, pids) == 8 and pairs_agree(report, labels, pids).all()
    assert (matched[bank.modality == 1] == labels.infrared).all(), "labels travel from infrared to visible"
    assert len(np.unique(np.stack([matched, pids]), axis=1).T) == 8
    assert pairs_right(report, labels, np.full(len(bank), -1)) == 0
    again, _ = match_labels(bank, labels, rule=rule, reading=reading)
    assert (again == matched).all()


def test_the_surplus_keeps_a_label_of_its_own_and_noise_stays_noise():
    bank, pids, labels = labelled()
    infrared = np.where(labels.infrared >= 6, -1, labels.infrared)  # two people are infrared noise
    matched, report = match_labels(bank, PseudoLabels(labels.visible, infrared, labels.joint, labels.modality))
    assert len(report.pairs) == 6 and len(report.alone_visible) == 2 and "leaves 2 over" in report.why
    assert (matched[bank.modality == 1] == infrared).all()
    alone = np.isin(labels.visible, report.alone_visible)
    assert set(matched[bank.modality == 0][alone]) == {6, 7} and set(matched[bank.modality == 0][~alone]) == set(range(6))


@pytest.mark.parametrize("empty", ["visible", "infrared", "both"])
def test_a_modality_without_clusters_leaves_everybody_alone(empty, caplog):
    bank, pids, labels = labelled()
    none = lambda y, name: np.full_like(y, -1) if empty in (name, "both") else y
    labels = PseudoLabels(none(labels.visible, "visible"), none(labels.infrared, "infrared"), labels.joint, labels.modality)
    matched, report = match_labels(bank, labels)
    assert not report.pairs and "nothing is matched" in caplog.text
    assert bool(report.why) == (empty != "both")
    assert ((matched >= 0) == (labels.intra >= 0)).all() and pairs_right(report, labels, pids) == 0
    check_report(report, len(set(labels.visible) - {-1}), len(set(labels.infrared) - {-1}))


def test_a_bank_of_one_modality_only():
    bank, _, labels = labelled()
    matched, report = match_labels(bank.infrared, PseudoLabels([], labels.infrared, labels.infrared, bank.infrared.modality))
    assert (matched == labels.infrared).all() and report.alone_infrared == list(range(8))


def test_one_cluster_and_clusters_smaller_than_the_memories():
    bank, pids, labels = labelled(n_ids=1)
    matched, report = match_labels(bank, labels)
    assert report.pairs == [[0, 0]] and (matched == 0).all() and report.why == ""
    bank, pids, labels = labelled(n_visible=2, n_infrared=1)
    _, report = match_labels(bank, labels, n=4)
    assert pairs_right(report, labels, pids) == 8


def test_match_labels_refuses_labels_of_other_samples():
    bank, _, labels = labelled()
    with pytest.raises(VireidError, match="same samples"):
        match_labels(bank.take(slice(0, 5)), labels)
    with pytest.raises(VireidError, match="identities"):
        pairs_right(MatchReport([], [], [], [], "hungarian", "paper", 4), labels, [0])
