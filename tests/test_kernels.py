"""From features to labels whatever the numbers: hypothesis draws the awkward banks, naive programs and scikit-learn judge; and once more with every index of every kernel checked."""
import importlib
import os
import pkgutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba.core.dispatcher import Dispatcher
from scipy.sparse import csr_array
from sklearn.cluster import DBSCAN

import vireid_nb
from vireid_nb.chunks import Lists, exact_dot
from vireid_nb.clustering import ClusterConfig, cross_modality_clustering, dbscan, modality_graphs
from vireid_nb.features import load_bank
from vireid_nb.jaccard import averaging_matrix, code_distances, expand_codes, jaccard_distance, neighbour_codes, to_dense
from vireid_nb.matching import match_labels
from vireid_nb.neighbors import knn, modality_knn
from vireid_nb.records import FeatureBank, VireidError
from vireid_nb.synthetic import make_vi_features, write_dataset

CHECKED = os.environ.get("NUMBA_BOUNDSCHECK") == "1"
some = settings(max_examples=15 if CHECKED else 60, deadline=None, derandomize=True)


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


# ---- naive programs


def knn_naive(x, k):
    dot = np.array([[exact_dot(a, b) for b in x] for a in x])  # the definition; what near-copies differ by is below the rounding of any other sum
    square = np.diag(dot)
    d = np.maximum(square[:, None] + square - 2 * dot, 0).astype(np.float32)
    np.fill_diagonal(d, -1)
    return d.argsort(1, kind="stable")[:, :k]


def jaccard_naive(x, ranks, k2, groups=()):
    n, k1 = ranks.shape
    half = min(round(k1 / 2) + 1, k1)
    mutual = lambda i, k: {j for j in ranks[i, :k] if i in ranks[j, :k]}
    V = np.zeros((n, n))
    for i in range(n):
        core = mutual(i, k1)
        for c in tuple(grown := set(core)):
            h = mutual(c, half)
            grown |= h if 3 * len(h & core) > 2 * len(h) else set()
        grown = sorted(grown)
        V[i, grown] = np.exp(2 * x[grown].astype(np.float64) @ x[i] - 2)
    V /= V.sum(1, keepdims=True)
    tree = lambda js, levels: np.mean([tree(js[levels[0][js] == g], levels[1:]) for g in np.unique(levels[0][js])], 0) if levels else V[js].mean(0)
    V = np.array([tree(js, list(groups)) for js in ranks[:, :k2]])
    m = np.array([np.minimum(row, V).sum(1) for row in V])
    return (1 - m / (2 - m)).clip(0)


# ---- awkward banks

KINDS = ("people", "all noise", "one cluster", "copies", "near copies", "few", "one camera", "no camera", "far apart in number")
FORMS = ("plain", "huge", "tiny", "ten times", "a little short", "float16", "float64", "bfloat16", "columns first", "backwards", "every other", "big-endian", "list")


def drawn(kind, seed):
    "(unit features [N, D], modality, camid) of a kind."
    rng = np.random.default_rng(seed)
    n, d = (4 if kind == "few" else int(rng.integers(20, 70))), int(rng.integers(2, 12))
    if kind == "all noise":
        n, d = 40, 256
    x = rng.normal(size=(n, d))
    person = rng.integers(0, 5, n)
    if kind in ("people", "one camera", "no camera", "far apart in number"):
        x = 3 * rng.normal(size=(5, d))[person] + x
    if kind == "one cluster":
        x = 50 * rng.normal(size=d) + x
    if kind in ("copies", "near copies"):
        x = x[person] + (1e-7 * x if kind == "near copies" else 0)
    modality = np.arange(n) % 2 if kind != "far apart in number" else (np.arange(n) < 2).astype(int)
    camid = {"one camera": np.zeros(n, int), "no camera": np.full(n, -1)}.get(kind, 3 * modality + rng.integers(0, 3, n))
    return unit(x + 1e-3), modality, camid


def formed(x, form):
    "The same features as somebody may hand them over."
    forms = {
        "huge": lambda: x * np.float32(1e30),
        "tiny": lambda: x * np.float32(1e-30),
        "ten times": lambda: x * np.float32(10),
        "a little short": lambda: x * np.float32(0.97),
        "float16": lambda: x.astype(np.float16),
        "float64": lambda: x.astype(np.float64),
        "bfloat16": lambda: torch.from_numpy(x).bfloat16(),
        "columns first": lambda: np.asfortranarray(x),
        "backwards": lambda: x[::-1].copy()[::-1],
        "every other": lambda: np.repeat(x, 2, 0)[::2],
        "big-endian": lambda: x.astype(">f4"),
        "list": lambda: x.tolist(),
    }
    return forms.get(form, lambda: x)()


def holds(distance, labels, eps, min_samples):
    "What is true of every graph and its labels."
    n, dense = distance.shape[0], to_dense(distance)
    assert np.isfinite(distance.data).all() and (distance.data >= 0).all() and (distance.data < distance.max_distance).all()
    assert (dense == dense.T).all() and (np.diag(dense) == 0).all() and dense.max() <= 1
    assert labels.shape == (n,) and set(labels) - {-1} == set(range(labels.max() + 1))
    assert (labels == DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(dense)).all()
    return dense


@given(st.sampled_from(KINDS), st.sampled_from(FORMS), st.integers(0, 10**6), st.sampled_from([(30, 6), (8, 3), (5, 1), (12, 12), (1, 1)]), st.sampled_from(["none", "modality", "camera"]), st.sampled_from([0.3, 0.6, 0.9]))
@example("copies", "huge", 1, (30, 6), "camera", 0.6)
@example("few", "bfloat16", 2, (30, 6), "modality", 0.6)
@example("one cluster", "tiny", 3, (12, 12), "none", 0.6)
@some
def test_from_features_to_labels(kind, form, seed, ks, groups, eps):
    x, modality, camid = drawn(kind, seed)
    bank = FeatureBank(formed(x, form), modality, camid, np.arange(len(x)))
    x = bank.features
    assert np.abs(np.linalg.norm(x, axis=1) - 1).max() < 0.05 and x.dtype == np.float32
    config = ClusterConfig(k1=ks[0], k2=ks[1], joint_k1=ks[0], joint_k2=ks[1], eps=eps, joint_eps=eps, joint_groups=groups)
    labels = cross_modality_clustering(bank, config)
    graphs = modality_graphs(bank, config)
    by = {"none": (), "modality": (modality,), "camera": (modality, camid)}[groups]
    for name, rows, levels in (("visible", modality == 0, ()), ("infrared", modality == 1, ()), ("joint", modality >= 0, by)):
        dense = holds(getattr(graphs, name), getattr(labels, name), eps, config.min_samples)
        ranks = knn_naive(x[rows], min(ks[0], rows.sum()))
        truth = jaccard_naive(x[rows], ranks, ks[1], [g[rows] for g in levels])
        assert np.abs(dense - truth)[truth < getattr(graphs, name).max_distance - 1e-5].max(initial=0) < 1e-5
    matched, report = match_labels(bank, labels)
    assert matched.shape == labels.joint.shape and np.isfinite(report.cost).all()


@pytest.mark.parametrize("length", [0.75, 1.0, 2.0, 5.0, 10.0, 1e6])
def test_any_length_gives_the_labels_of_length_one_or_says_so(length, caplog):
    bank, _ = make_vi_features(20, 8, 6, seed=0)
    other = FeatureBank(bank.features * np.float32(length), bank.modality, bank.camid, bank.index)
    assert ("not of unit length" in caplog.text) == (length > 1.01)
    if length >= 1:
        want, got = (cross_modality_clustering(b, ClusterConfig(k1=10)) for b in (bank, other))
        assert all((getattr(want, k) == getattr(got, k)).all() for k in ("visible", "infrared", "joint"))


def test_lengths_in_a_bare_array_follow_the_same_rule(caplog):
    x = unit(np.random.default_rng(0).normal(size=(60, 6)))
    same = jaccard_distance(x, k1=10)
    assert not caplog.text
    ranks, sqdist = knn(10 * x, 10)  # of the raw lengths: the order holds, the distances do not
    for got in (jaccard_distance(10 * x, k1=10), jaccard_distance(10 * x, k1=10, ranks=ranks, sqdist=sqdist)):
        assert np.abs(to_dense(got) - to_dense(same)).max() < 1e-5
    assert "jaccard_distance: 60 of 60 rows are not of unit length (row 0: 10)" in caplog.text
    with pytest.raises(VireidError, match="unit length first"):
        knn(1e-20 * x, 5)
    for refused, why in ((0 * x, "all zeros"), (np.where(np.arange(60)[:, None] == 7, np.nan, x), r"row 7\)"), (x[0], r"\[N, D\]"), (x[:, :0], "at least one column"), ([[1.0], [1.0, 2.0]], "no matrix"), ([["a"]], "no matrix")):
        with pytest.raises(VireidError, match=why):
            jaccard_distance(refused, k1=3)


# ---- tables and codes of somebody else's making


def test_a_table_the_kernels_cannot_follow_is_refused():
    x = unit(np.random.default_rng(0).normal(size=(30, 6)))
    ranks, sqdist = knn(x, 10)
    for table in (ranks + 25, ranks - 1, ranks[:, 0], ranks[:20], ranks + 0.5, ranks[:, :0]):
        for call in (lambda: jaccard_distance(x, k1=10, ranks=table), lambda: neighbour_codes(x, table), lambda: averaging_matrix(table, 3)):
            if call.__code__.co_names[-1:] == ("averaging_matrix",) and len(np.shape(table)) == 2 and len(table) == 20 and table.max() < 20:
                continue
            with pytest.raises(VireidError):
                call()
    with pytest.raises(VireidError, match="both must be of one search"):
        neighbour_codes(x, ranks, sqdist[:, :4])


def test_a_table_with_one_neighbour_many_times_stays_inside_its_arrays():
    x = unit(np.random.default_rng(0).normal(size=(12, 6)))
    ranks = np.zeros((12, 12), int)
    ranks[:, ::2] = np.arange(12)[:, None]
    distance = jaccard_distance(x, k1=12, k2=12, ranks=ranks)
    holds(distance, dbscan(distance, eps=0.5), 0.5, 4)


@given(st.integers(1, 40), st.integers(1, 6), st.floats(0, 1), st.integers(0, 10**6))
@some
def test_weights_of_zero_count_once(n, k2, zeros, seed):
    rng = np.random.default_rng(seed)
    dense = rng.random((n, n)) * (rng.random((n, n)) < 0.5) + np.eye(n)
    V = csr_array((dense / dense.sum(1, keepdims=True)).astype(np.float32))
    V.data[rng.random(V.nnz) < zeros] = 0  # stored, with no weight
    ranks = np.array([rng.permutation(n)[: min(k2, n)] for _ in range(n)])
    A = averaging_matrix(ranks, k2)
    E = expand_codes(V, A)
    assert np.abs(E.toarray() - A.toarray() @ V.toarray()).max() < 1e-6 and E.has_canonical_format
    for cap in (1.0, 0.6, 0.3):
        m = np.array([np.minimum(row, E.toarray()).sum(1) for row in E.toarray()])
        got, d = to_dense(code_distances(E, cap)), 1 - m / (2 - m)
        np.fill_diagonal(d, 0)
        assert np.abs(got - d)[d < cap - 1e-5].max(initial=0) < 1e-5


@pytest.mark.parametrize("spoil", [lambda V: -V, lambda V: 2 * V, lambda V: V * np.nan, lambda V: V.toarray(), lambda V: V[:5]])
def test_codes_that_are_none_are_refused(spoil):
    x = unit(np.random.default_rng(0).normal(size=(30, 6)))
    ranks, _ = knn(x, 8)
    V, A = neighbour_codes(x, ranks), averaging_matrix(ranks, 4)
    for call in (lambda: expand_codes(spoil(V), A), lambda: code_distances(spoil(V), 1.0)):
        with pytest.raises(VireidError):
            call()
    with pytest.raises(VireidError, match="averaging_matrix"):
        expand_codes(V, csr_array(np.tril(np.ones((30, 30), np.float32))))


# ---- copies


@pytest.mark.parametrize("noise", [0, 1e-7, 3e-5])
def test_hundreds_of_copies_and_near_copies(noise):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 32))
    x[::2] = x[0] + noise * rng.normal(size=(250, 32))
    x, modality = unit(x), rng.integers(0, 2, 500)
    for backend in ("torch", "faiss"):
        assert (knn(x, 12, backend=backend)[0] == knn_naive(x, 12)).all()
    for (ranks, _), rows in zip(modality_knn(x, modality, 12, 20), (modality == 0, modality == 1, modality >= 0)):
        assert (ranks == knn_naive(x[rows], ranks.shape[1])).all()


def test_what_copies_cost_does_not_grow_with_their_number(monkeypatch):
    from vireid_nb import _search_kernels as kernels

    compared, chunks = [], kernels.in_chunks

    def counting(kernel, n, *args, **more):
        compared.append(n if kernel is kernels._among_all else 0)
        return chunks(kernel, n, *args, **more)

    monkeypatch.setattr(kernels, "in_chunks", counting)
    x = unit(np.random.default_rng(0).normal(size=(600, 16)))
    x[100:400] = x[0]
    knn(x, 10)
    assert 1 <= sum(compared) < 30  # the copies once, and the few who have them for neighbours


# ---- banks and their files

GOOD = dict(features=np.eye(4, dtype=np.float32), modality=[0, 0, 1, 1], camid=[0, 1, -1, 2], index=[3, 9, 0, 1])
REFUSED = [
    ("index", [3, 9, 3, 1], "index holds 3 more than once"),
    ("index", [3, 9, -1, 1], "index is -1 in row 2"),
    ("index", [0.5, 1, 2, 3], "whole numbers"),
    ("index", list("abcd"), "whole numbers"),
    ("camid", [0, -2, 0, 0], "camid is -2 in row 1"),
    ("camid", [0, np.nan, 0, 0], "whole numbers"),
    ("modality", [0, 2, 1, 2], "modality is 2 in rows 1, 3"),
    ("modality", [[0, 0, 1, 1]], "one value a row"),
    ("features", np.ones(4), r"shape \(4,\)"),
    ("features", np.float32(1), r"shape \(\)"),
    ("features", np.empty((4, 0)), "at least one column"),
    ("features", [[1.0], [1.0, 0.0], [1.0], [1.0]], "no matrix"),
    ("features", [["a"]] * 4, "no matrix"),
    ("features", np.eye(4) * [[1], [0], [1], [1]], "all zeros .row 1"),
    ("features", np.where(np.eye(4) > 0, np.inf, 0), "rows 0, 1, 2, 3"),
    ("features", np.eye(3), "one value a row"),
]


@pytest.mark.parametrize("name, value, why", REFUSED)
def test_a_bank_refuses_in_one_line(name, value, why):
    with pytest.raises(VireidError, match=why) as e:
        FeatureBank(**GOOD | {name: value})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name, value, why", [r for r in REFUSED if not isinstance(r[1], list) or np.asarray(r[1], dtype=object).ndim == 1 and not isinstance(r[1][0], (str, list))])
def test_a_file_refuses_in_one_line_with_its_name(name, value, why, tmp_path):
    from safetensors.numpy import save_file

    save_file({k: np.ascontiguousarray(v).reshape(np.shape(v)) for k, v in (GOOD | {name: value}).items()}, tmp_path / "odd.safetensors")
    with pytest.raises(VireidError, match=f"odd.safetensors.*{why}"):
        load_bank(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_file_of_any_precision_loads(dtype, tmp_path):
    from safetensors.torch import save_file

    x = unit(np.random.default_rng(0).normal(size=(9, 5)))
    columns = {k: torch.arange(9) % m for k, m in (("modality", 2), ("camid", 3), ("index", 9))}
    save_file({"features": torch.from_numpy(x).to(getattr(torch, dtype)), **{k: v.to(torch.int32) for k, v in columns.items()}}, tmp_path / "b.safetensors")
    bank = load_bank(tmp_path / "b.safetensors")
    assert bank.features.dtype == np.float32 and bank.index.dtype == np.int64
    assert np.abs(bank.features - x).max() < {"float16": 1e-3, "bfloat16": 1e-2}.get(dtype, 1e-7)
    assert np.abs(np.linalg.norm(bank.features, axis=1) - 1).max() < 1e-6


# ---- every kernel, every index


def kernels():
    "{name: compiled function} of the package."
    modules = [importlib.import_module(f"vireid_nb.{m.name}") for m in pkgutil.iter_modules(vireid_nb.__path__) if m.name not in ("widgets",)]
    return {f"{m.__name__}.{n}": f for m in modules for n, f in vars(m).items() if isinstance(f, Dispatcher)}


@pytest.mark.skipif(not CHECKED, reason="runs inside the next test")
def test_every_kernel_has_run(tmp_path):
    write_dataset(tmp_path / "set", "sysu", n_train_ids=2, n_test_ids=1, progress=False)
    for backend in ("pivots", "faiss-ivf"):
        knn(unit(np.random.default_rng(0).normal(size=(900, 8))), 10, backend=backend)
    join = next(f for n, f in kernels().items() if n.endswith("._join"))  # otherwise only several processes call it
    ours, theirs = (np.array([[3, 2, 1]], np.float32) + shift for shift in (0, 0.5))
    ids = np.array([[4, 5, 6]], np.int32)
    join(0, 1, Lists(theirs, ids + 10), Lists(ours, ids))
    assert ids.tolist() == [[14, 4, 15]]
    inlined = {n for n, f in kernels().items() if f.targetoptions.get("inline") == "always"}
    idle = [n for n, f in kernels().items() if not f.signatures and n not in inlined]
    assert not idle, f"no test calls {idle}"


@pytest.mark.skipif(CHECKED, reason="is running")
def test_no_kernel_indexes_past_its_arrays(tmp_path):
    env = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
