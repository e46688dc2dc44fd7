"""Neighbours, Jaccard distances and clusterings: the published numbers, naive oracles on awkward input, and the same bits on any thread or tile."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from sklearn.cluster import DBSCAN

from vireid_nb import _jaccard_kernels, _search_kernels
from vireid_nb._jaccard_kernels import _as_csr, _by_columns, _choose, _encode_device, _expand_device, _near_pairs_device
from vireid_nb._search_kernels import View, _search
from vireid_nb.chunks import Csc
from vireid_nb.clustering import CLUSTER_PRESETS, ClusterConfig, cap_for, cross_modality_clustering, dbscan, modality_graphs
from vireid_nb.jaccard import averaging_matrix, code_distances, expand_codes, jaccard_distance, neighbour_codes, to_dense
from vireid_nb.neighbors import knn, modality_knn
from vireid_nb.records import FeatureBank, VireidError
from vireid_nb.synthetic import make_vi_features

GOLDEN = Path(__file__).parent / "golden"
JACCARD = sorted(p.stem for p in GOLDEN.glob("[abc]_*jaccard*.npz"))
quick = settings(max_examples=40, deadline=None, derandomize=True)


def unit(rng, n, d):
    x = rng.normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def groups_of(golden):
    return {1: None, 2: (golden.get("modality"),), 3: (golden.get("modality"), golden.get("camera"))}[1 + ("modality" in golden) + ("camera" in golden)]


@pytest.fixture(params=JACCARD)
def golden(request):
    return dict(np.load(GOLDEN / f"{request.param}.npz"))


# ---- goldens


def test_golden_files_are_there():
    assert len(JACCARD) == 9


def test_neighbours_equal_the_published_table(golden):
    for backend in ("torch", "faiss"):
        ranks, _ = knn(golden["features"], int(golden["k1"]), backend=backend)
        assert (ranks == golden["neighbours"]).all()


def test_jaccard_and_labels_equal_the_published_ones(golden):
    k1, k2, groups = int(golden["k1"]), int(golden["k2"]), groups_of(golden)
    distance = jaccard_distance(golden["features"], k1=k1, k2=k2, groups=groups)
    assert np.abs(to_dense(distance) - golden["jaccard"]).max() < 5e-6
    assert (distance != distance.T).nnz == 0 and (distance.diagonal() == 0).all()
    for eps, labels in ((0.6, golden["dbscan_eps06"]), (0.3, golden["dbscan_eps03"])):
        assert (dbscan(distance, eps=eps) == labels).all()
        capped = jaccard_distance(golden["features"], k1=k1, k2=k2, groups=groups, max_distance=cap_for(eps))
        assert (dbscan(capped, eps=eps) == labels).all()


def test_tensor_path_equals_the_published_numbers(golden):
    k1, k2 = int(golden["k1"]), int(golden["k2"])
    ranks, _ = knn(golden["features"], k1)
    got = device_distance(golden["features"], ranks, k2, groups_of(golden))
    assert np.abs(to_dense(got) - golden["jaccard"]).max() < 5e-6


def test_one_camera_a_modality_nested_equals_modality():
    g = dict(np.load(GOLDEN / "c_modality_camera_jaccard_regdb_k1_38_k2_18.npz"))
    ranks, _ = knn(g["features"], 38)
    a = averaging_matrix(ranks, 18, (g["modality"],))
    for averaging in ("nested", "flat"):
        b = averaging_matrix(ranks, 18, (g["modality"], g["camera"] + 5 * g["modality"]), averaging)
        assert np.abs((a - b).data).max(initial=0) < 1e-7


def device_distance(x, ranks, k2, groups=None, cap=1.0, averaging="nested"):
    code = _encode_device(torch.as_tensor(x), torch.as_tensor(ranks))
    if k2 > 1:
        A = averaging_matrix(ranks, k2, groups, averaging)
        code = _expand_device(code, torch.as_tensor(ranks[:, :k2]), torch.as_tensor(A.data.reshape(len(ranks), -1)))
    return _near_pairs_device(code, cap)


# ---- neighbours


def knn_naive(x, k):
    out = []
    for i in range(len(x)):
        d = ((x.astype(np.float64) - x[i]) ** 2).sum(1)
        d[i] = -1
        out.append(np.lexsort((np.arange(len(x)), d))[:k])
    return np.array(out)


@given(st.integers(1, 90), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6), st.integers(1, 30))
@quick
def test_knn_equals_the_oracle_with_ties_and_copies(n, d, levels, seed, k):
    x = np.random.default_rng(seed).integers(0, levels, (n, d)).astype(np.float32)
    k = min(k, n)
    expected = knn_naive(x, k)
    for backend in ("torch", "faiss"):
        ranks, sqdist = knn(x, k, backend=backend)
        assert (ranks == expected).all()
        assert (sqdist == ((x[:, None] - x[expected]) ** 2).sum(-1)).all()
        assert ranks.dtype == np.int64 and sqdist.dtype == np.float32
    view = View(0, n, slice(0, 1), (0, n), k, np.arange(n))
    xt = torch.from_numpy(x)
    ((ranks, sqdist),) = _search(xt, [n], [view])
    assert (ranks.numpy() == expected).all()


@given(st.integers(2, 80), st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 20), st.booleans())
@quick
def test_modality_knn_is_three_searches(n, seed, k, joint_k, ties):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 3, (n, 3)).astype(np.float32) if ties else unit(rng, n, 12)
    modality = rng.permutation(np.arange(n) % 2)
    visible, infrared, joint = modality_knn(x, modality, k, joint_k)
    for (ranks, sqdist), rows in ((visible, modality == 0), (infrared, modality == 1), (joint, modality >= 0)):
        alone = knn(x[rows], joint_k if rows.all() else k)
        assert (ranks == alone[0]).all() and (sqdist == alone[1]).all()
    on_device = _search(torch.from_numpy(x), [n], [View(0, n, slice(0, 1), (0, n), min(joint_k, n), np.arange(n))])
    assert (on_device[0][0].numpy() == joint[0]).all()


def test_near_copies_beyond_the_margin_are_found_by_brute_force(caplog):
    x = np.repeat(unit(np.random.default_rng(0), 3, 16), 50, 0)
    ranks, sqdist = knn(x, 10)
    assert (ranks == knn_naive(x, 10)).all() and (sqdist == 0).all()
    assert "brute force" in caplog.text


def test_a_collapsed_network_gives_index_order():
    ranks, sqdist = knn(np.ones((70, 8), np.float32), 5)
    assert (ranks[:, 0] == np.arange(70)).all() and (ranks[10:, 1:] == [0, 1, 2, 3]).all() and (sqdist == 0).all()


def test_bits_do_not_depend_on_threads_or_tiles(monkeypatch):
    rng = np.random.default_rng(1)
    x, modality = unit(rng, 900, 48), np.arange(900) % 2

    def everything():
        tables = modality_knn(x, modality, 15, 20)
        distance = jaccard_distance(x, k1=20, k2=9, groups=(modality,))
        return [a for table in tables for a in table] + [distance.indptr, distance.indices, distance.data]

    before, reference = torch.get_num_threads(), everything()
    try:
        for threads in {1, 2, before}:
            torch.set_num_threads(threads)
            for tile in (2048, 256, 100):
                monkeypatch.setattr(_search_kernels, "TILE", tile)
                assert all(a.tobytes() == b.tobytes() for a, b in zip(everything(), reference))
    finally:
        torch.set_num_threads(before)


def test_torchs_threads_are_left_as_they_were():
    "numba's own pool would reset OpenMP's thread count under torch, and with it the last bits of a training."
    code = "import torch; torch.set_num_threads(1); from vireid_nb.synthetic import make_vi_features; from vireid_nb.clustering import *; import time"
    code += "; cross_modality_clustering(make_vi_features(6, 8, 8)[0], ClusterConfig(k1=6, joint_k1=8, joint_k2=4)); a = torch.randn(700, 700); a @ a"
    code += "; c, t = time.process_time(), time.perf_counter(); [a @ a for _ in range(40)]; print((time.process_time() - c) / (time.perf_counter() - t))"
    cores = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert cores < 1.4, f"torch was told to use one thread and used {cores:.1f}"


def test_row_order_does_not_change_the_distance():
    rng = np.random.default_rng(2)
    x, p = unit(rng, 200, 16), rng.permutation(200)
    a, b = to_dense(jaccard_distance(x, k1=15)), to_dense(jaccard_distance(x[p], k1=15))
    assert np.abs(a[np.ix_(p, p)] - b).max() < 1e-6


@pytest.mark.parametrize("backend", ["pivots", "faiss-ivf"])
def test_an_approximate_search_is_close_and_self_comes_first(backend):
    x = unit(np.random.default_rng(3), 3000, 8)
    exact, _ = knn(x, 10)
    near, _ = knn(x, 10, backend=backend)
    assert (near[:, 0] == np.arange(3000)).all()
    assert np.mean([len(set(a) & set(b)) for a, b in zip(exact, near)]) > 8


@pytest.mark.parametrize("x, word", [([[0.0, np.nan]], "NaN"), ([[np.inf, 1]], "infinity"), (np.empty((0, 3)), "no samples"), (np.ones(4), "[N, D]")])
def test_knn_refuses(x, word):
    with pytest.raises(VireidError, match=word.replace("[", r"\[")):
        knn(np.asarray(x), 1)


# ---- Jaccard


def jaccard_naive(x, k1, k2, groups=(), averaging="nested"):
    ranks = knn_naive(x, k1)
    R = [{j for j in ranks[i] if i in ranks[j]} for i in range(len(x))]
    h = min(round(k1 / 2) + 1, k1)
    H = [{j for j in ranks[i, :h] if i in ranks[j, :h]} for i in range(len(x))]
    V = np.zeros((len(x), len(x)))
    for i in range(len(x)):
        grown = sorted(R[i].union(*(H[c] for c in R[i] if 3 * len(H[c] & R[i]) > 2 * len(H[c]))))
        V[i, grown] = np.exp(2 * (x[grown].astype(np.float64) @ x[i]) - 2)
    V /= V.sum(1, keepdims=True)

    def mean(rows, levels):
        if not levels:
            return V[rows].mean(0)
        return np.mean([mean(rows[levels[0][rows] == g], levels[1:]) for g in np.unique(levels[0][rows])], 0)

    levels = [groups[0] * 100 + groups[1]] if len(groups) == 2 and averaging == "flat" else list(groups)
    V = np.array([mean(rows, levels) for rows in ranks[:, :k2]])
    m = np.minimum(V[:, None], V).sum(-1)
    return (1 - m / (2 - m)).clip(0)


@given(st.integers(2, 60), st.integers(1, 25), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from(["plain", "modality", "nested", "flat"]), st.booleans())
@quick
def test_jaccard_equals_the_oracle(n, k1, k2, seed, variant, copies):
    rng = np.random.default_rng(seed)
    x = unit(rng, n, 6)
    if copies:
        x = x[rng.integers(0, max(1, n // 2), n)]
    modality, camid = rng.integers(0, 2, n), rng.integers(0, 3, n)
    groups = {"plain": None, "modality": (modality,)}.get(variant, (modality, camid))
    averaging = "flat" if variant == "flat" else "nested"
    k1 = min(k1, n)
    expected = jaccard_naive(x, k1, min(k2, k1), groups or (), averaging)
    got = jaccard_distance(x, k1=k1, k2=k2, groups=groups, averaging=averaging)
    assert np.abs(to_dense(got) - expected).max() < 1e-5
    assert (got.data < 1).all() and got.has_sorted_indices
    capped = jaccard_distance(x, k1=k1, k2=k2, groups=groups, averaging=averaging, max_distance=0.5)
    kept = to_dense(got) < np.float32(0.5)
    assert capped.nnz == kept.sum() and (to_dense(capped)[kept] == to_dense(got)[kept]).all()
    on_device = device_distance(x, knn(x, k1)[0], min(k2, k1), groups, averaging=averaging)
    assert np.abs(to_dense(on_device) - to_dense(got)).max() < 1e-6


def test_known_distances_change_nothing_but_time():
    x = unit(np.random.default_rng(4), 300, 32)
    ranks, sqdist = knn(x, 25)
    a, b = jaccard_distance(x, k1=20, ranks=ranks), jaccard_distance(x, k1=20, ranks=ranks, sqdist=sqdist)
    assert (a.indices == b.indices).all() and np.abs(a.data - b.data).max() < 1e-6


def test_codes_use_dot_products_of_features_as_given():
    x = unit(np.random.default_rng(5), 80, 8) * np.random.default_rng(6).uniform(0.8, 1, (80, 1)).astype(np.float32)
    V = neighbour_codes(x, *knn(x, 10)).toarray()
    i, j = np.nonzero(V)
    weight = np.exp(2 * (x[i] * x[j]).sum(1) - 2)
    assert np.abs(V[i, j] - weight / np.bincount(i, weight)[i]).max() < 1e-6


def test_full_columns_change_no_bit(monkeypatch):
    x = unit(np.random.default_rng(7), 400, 300) + np.float32(0.2)
    ranks, sqdist = knn(x, 30)
    V = expand_codes(neighbour_codes(x, ranks, sqdist), averaging_matrix(ranks, 20))
    reference = code_distances(V, 1.0)
    none = lambda columns: (np.full(400, -1, np.int32), np.zeros((0, 400), np.float32))
    monkeypatch.setattr(_jaccard_kernels, "_full_columns", none)
    sparse = code_distances(V, 1.0)
    assert reference.data.tobytes() == sparse.data.tobytes() and (reference.indices == sparse.indices).all()


def test_k_beyond_the_set_is_cut_and_said(caplog):
    x = unit(np.random.default_rng(8), 12, 4)
    assert (to_dense(jaccard_distance(x, k1=30, k2=20)) == to_dense(jaccard_distance(x, k1=12, k2=12))).all()
    assert "going on with 12" in caplog.text and "averaging these" in caplog.text


BAD_CALLS = [
    (dict(max_distance=0), "max_distance"),
    (dict(k1=0), "k1 is 0"),
    (dict(groups=([0],)), "one value"),
    (dict(ranks=np.zeros((3, 2), int)), "ranks have shape"),
    (dict(averaging="mean"), "nested or flat"),
]


@pytest.mark.parametrize("bad, word", BAD_CALLS)
def test_jaccard_refuses(bad, word):
    with pytest.raises(VireidError, match=word):
        jaccard_distance(unit(np.random.default_rng(9), 20, 4), **{"k1": 5, "k2": 2} | bad)


# ---- clustering


def as_graph(dense):
    i, j = np.nonzero(dense < 1)
    return csr_array((dense[i, j], j, np.concatenate([[0], np.cumsum((dense < 1).sum(1))])), shape=dense.shape)


@given(st.integers(1, 70), st.integers(0, 10**6), st.sampled_from([0.1, 0.2, 0.3, 0.6]), st.integers(1, 7), st.floats(1.2, 12))
@quick
def test_dbscan_is_scikit_learns(n, seed, eps, min_samples, spread):
    rng = np.random.default_rng(seed)
    dense = np.round(rng.uniform(0, spread, (n, n)), 1).clip(0, 1).astype(np.float32)  # many ties, also at eps
    dense = np.minimum(dense, dense.T)
    np.fill_diagonal(dense, 0)
    expected = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(dense)
    assert (dbscan(as_graph(dense), eps=eps, min_samples=min_samples) == expected).all()


@pytest.mark.parametrize("eps", [0.0, -0.1, 1.0, 1.5, 0.51, 0.5, float("nan")])
def test_dbscan_refuses_what_the_graph_cannot_answer(eps):
    graph = jaccard_distance(unit(np.random.default_rng(10), 40, 4), k1=8, max_distance=0.5)
    with pytest.raises(VireidError, match="eps"):
        dbscan(graph, eps=eps)


@pytest.mark.parametrize("joint_groups", ["none", "modality", "camera"])
@pytest.mark.parametrize("intra_groups", ["none", "camera"])
def test_one_pass_is_three_clusterings_in_any_row_order(joint_groups, intra_groups):
    bank, _ = make_vi_features(12, 8, 6, dim=32, seed=3)
    bank = bank.take(np.random.default_rng(0).permutation(len(bank)))
    config = ClusterConfig(k1=9, k2=4, eps=0.55, joint_k1=14, joint_k2=8, joint_eps=0.6, intra_groups=intra_groups, joint_groups=joint_groups)
    got = cross_modality_clustering(bank, config)
    for name, part, k1, k2, eps, kind in (("visible", bank.visible, 9, 4, 0.55, intra_groups), ("infrared", bank.infrared, 9, 4, 0.55, intra_groups), ("joint", bank, 14, 8, 0.6, joint_groups)):
        groups = {"none": None, "modality": (part.modality,), "camera": (part.modality, part.camid)}[kind]
        assert (getattr(got, name) == dbscan(jaccard_distance(part.features, k1=k1, k2=k2, groups=groups), eps=eps)).all()


def test_graphs_answer_other_eps():
    bank, _ = make_vi_features(10, 8, 6, dim=32, seed=4)
    config = ClusterConfig(k1=8, k2=3, joint_k1=12, joint_k2=6, eps=0.4, joint_eps=0.4)
    graphs = modality_graphs(bank, config, max_eps=0.8)
    assert (graphs.labels(eps=0.7, joint_eps=0.7).joint == cross_modality_clustering(bank, ClusterConfig(**{**vars(config), "eps": 0.7, "joint_eps": 0.7})).joint).all()
    with pytest.raises(VireidError, match="max_distance"):
        graphs.labels(joint_eps=0.9)
    with pytest.raises(VireidError, match="eps is 0"):
        graphs.labels(eps=0.0)


def test_bad_banks(caplog):
    bank, _ = make_vi_features(4, 5, 4, dim=16, seed=5)
    with pytest.raises(VireidError, match="both modalities"):
        cross_modality_clustering(bank.infrared)
    labels = cross_modality_clustering(bank)  # 20 + 16 samples, k1 30 and 40
    assert labels.info["used"]["infrared"]["k1"] == 16 and "going on with 16" in caplog.text
    rng = np.random.default_rng(0)
    diffuse = FeatureBank(unit(rng, 60, 512), np.arange(60) % 2, np.full(60, -1), np.arange(60))
    caplog.clear()
    nothing = cross_modality_clustering(diffuse, ClusterConfig(k1=5, k2=2, joint_k1=5, joint_k2=2, eps=0.05, joint_eps=0.05, joint_groups="camera"))
    assert (nothing.joint == -1).all() and nothing.info["noise"]["joint"] == 1.0
    assert "all noise" in caplog.text and "no camera" in caplog.text


def test_presets_are_the_published_values():
    regdb = CLUSTER_PRESETS["mmm-regdb"]
    assert (regdb.k1, regdb.k2, regdb.eps, regdb.joint_k1, regdb.joint_k2, regdb.joint_eps) == (30, 6, 0.3, 38, 18, 0.3)
    assert CLUSTER_PRESETS["dmic-sysu"].joint_groups == "camera"
    with pytest.raises(VireidError, match="k1"):
        ClusterConfig(k1=0)


@pytest.mark.parametrize("k1, k2, near", [(40, 32, False), (300, 6, True)], ids=["few pairs left", "all pairs left"])
def test_entries_that_wait_change_no_bit(k1, k2, near):
    x = unit(np.random.default_rng(5), 600, 64)
    ranks, sqdist = knn(x, k1)
    V = expand_codes(neighbour_codes(x, ranks, sqdist), averaging_matrix(ranks, k2))
    rows = _as_csr(V)
    columns = Csc(*_by_columns(rows))
    waits, enough = np.zeros(600, bool), np.float32(2 * 0.4 / 1.4)
    waiting = [_choose(i, rows, columns, enough, waits)[0] for i in range(600)]
    assert (np.array(waiting) > 0).sum() > 50 and max(waiting) < enough
    some, every = code_distances(V, 0.6), code_distances(V, 1.0)  # where nothing may wait
    below = every.data < np.float32(0.6)
    assert np.array_equal(some.indices, every.indices[below]) and np.array_equal(some.data, every.data[below])
    assert (some.nnz > 100_000) == near and some.nnz > 600
