"Searches that are divided or approximate."

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from vireid_nb import _search_kernels as kernels
from vireid_nb.clustering import ClusterConfig, cross_modality_clustering
from vireid_nb.jaccard import jaccard_distance, to_dense
from vireid_nb.neighbors import BACKENDS, knn, modality_knn, search_recall
from vireid_nb.records import VireidError
from vireid_nb.synthetic import make_vi_features


def test_two_processes_find_what_one_finds_bit_for_bit(tmp_path):
    script = Path(__file__).with_name("shared_search.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(tmp_path / f"{r}.txt").read_text() for r in range(2)] == ["", ""], "differs from one process"


@pytest.fixture(scope="module")
def bank():
    return make_vi_features(150, 30, 20, dim=48, noise=0.8, seed=1)


def test_recall_is_the_share_of_true_neighbours(bank):
    x = bank[0].features
    ranks, _ = knn(x, 20)
    assert search_recall(x, ranks) == 1
    half = ranks.copy()
    half[:, 11:] = ranks[:, :1]  # nine of nineteen are not neighbours
    assert abs(search_recall(x, half, samples=len(x)) - 10 / 19) < 1e-9
    assert search_recall(x, ranks[:, :1]) == 1


@pytest.mark.parametrize("backend", ["pivots", "faiss-ivf"])
def test_recall_by_blocks_equals_recall_at_once(bank, backend):
    x = bank[0].features
    near, _ = knn(x, 20, backend=backend)
    true, _ = knn(x, 20)
    counted = np.mean([np.isin(near[i, 1:], true[i, 1:]).mean() for i in range(len(x))])
    assert abs(search_recall(x, near, samples=len(x)) - counted) < 1e-3


def test_friends_probes_and_turns_each_raise_recall(monkeypatch):
    x = make_vi_features(800, 15, 10, dim=64, seed=2)[0].features
    monkeypatch.setattr(kernels, "PROBES", 1)
    found = {}
    for turns, friends in [(1, False), (3, False), (3, True)]:
        with monkeypatch.context() as m:
            m.setattr(kernels, "TURNS", turns)
            if not friends:
                m.setattr(kernels, "_befriended", lambda points, ends, lists, rows, shared: lists)
            found[turns, friends] = search_recall(x, knn(x, 15, backend="pivots")[0], samples=1000)
    monkeypatch.undo()
    whole = search_recall(x, knn(x, 15, backend="pivots")[0], samples=1000)
    assert found[1, False] < found[3, False] < found[3, True] < whole and whole > 0.95, (found, whole)


def test_copies_of_one_picture_do_not_make_all_pairs(monkeypatch):
    rng = np.random.default_rng(0)
    x = np.concatenate([np.repeat(rng.normal(size=(1, 16)), 12000, 0), rng.normal(size=(3000, 16))]).astype(np.float32)
    compared, chunks = [], kernels.in_chunks

    def counting(kernel, n, *args, **more):
        if kernel is kernels._scan_cell:
            compared.append(args[0].size)
        return chunks(kernel, n, *args, **more)

    monkeypatch.setattr(kernels, "in_chunks", counting)
    ranks, sqdist = knn(x, 10, backend="pivots")
    assert 0 < sum(compared) / 2 < kernels.TURNS * 12000**2 / 4  # each tile is looked at from both sides
    assert (sqdist[:12000] == 0).all() and (ranks[:12000] < 12000).all()


@pytest.mark.parametrize("backend", ["pivots", "faiss-ivf"])
def test_approximate_tables_are_well_formed(bank, backend):
    x = bank[0].features
    ranks, sqdist = knn(x, 20, backend=backend)
    assert (ranks[:, 0] == np.arange(len(x))).all() and (np.diff(sqdist, axis=1) >= 0).all()
    assert all(len(set(row)) == 20 for row in ranks)
    visible, infrared, joint = modality_knn(x, bank[0].modality, 10, 20, backend=backend)
    assert visible[0].max() < len(visible[0]) and infrared[0].max() < len(infrared[0]) and len(joint[0]) == len(x)


def test_approximate_labels_are_nearly_those_of_the_exact_search(bank):
    config = dict(k1=15, k2=6, joint_k1=20, joint_k2=8)
    exact, near = (cross_modality_clustering(bank[0], ClusterConfig(**config, search=s)) for s in ("exact", "approximate"))
    for name in ("visible", "infrared", "joint"):
        assert adjusted_rand_score(getattr(exact, name), getattr(near, name)) > 0.9


def test_faiss_multiplies_with_the_kernels_that_numpy_chose():
    ask = "import os; from threadpoolctl import threadpool_info as t; import vireid_nb._search_kernels as k; k.load_faiss(); print({i['architecture'] for i in t() if i['internal_api'] == 'openblas'}, os.environ.get('OPENBLAS_CORETYPE'))"
    env = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, env=env).stdout
    assert told.count("'") == 2 and told.endswith("None\n"), told  # one architecture for all, nothing left behind


def test_a_device_that_is_not_there_is_refused(bank, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(VireidError, match="sees no CUDA device"):
        cross_modality_clustering(bank[0], ClusterConfig(device="cuda"))
    for backend in BACKENDS:
        with pytest.raises(VireidError, match="sees no CUDA device"):
            knn(bank[0].features, 5, backend=backend, device="cuda")
    with pytest.raises(VireidError, match="search is 'quick'; choose exact or approximate"):
        ClusterConfig(search="quick")


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the same code runs through torch on the CPU in test_pseudo_labels")


@needs_cuda
@pytest.mark.parametrize("tf32", [False, True])
def test_tables_on_cuda_are_those_of_the_cpu(bank, monkeypatch, tf32):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    x, modality = bank[0].features, bank[0].modality
    ours, theirs = knn(x, 20), knn(x, 20, device="cuda")
    assert np.array_equal(ours[0], theirs[0]) and np.allclose(ours[1], theirs[1], atol=1e-6)
    views = [modality_knn(x, modality, 10, 20, device=device) for device in ("cpu", "cuda")]
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(*views))


@needs_cuda
def test_pivots_on_cuda_find_what_they_find_on_the_cpu(bank):
    x = bank[0].features
    here, there = (knn(x, 20, backend="pivots", device=device)[0] for device in ("cpu", "cuda"))
    assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(here, there)]) > 0.99


@needs_cuda
@pytest.mark.parametrize("groups", [(), ("modality",), ("modality", "camid")])
def test_distances_on_cuda_are_those_of_the_cpu(bank, groups):
    groups = [getattr(bank[0], g) for g in groups]
    here, there = (to_dense(jaccard_distance(bank[0].features, k1=20, k2=6, groups=groups, device=device)) for device in ("cpu", "cuda"))
    assert np.abs(here - there).max() < 1e-5


@needs_cuda
def test_labels_on_cuda_are_those_of_the_cpu(bank):
    config = dict(k1=15, k2=6, joint_k1=20, joint_k2=8)
    here, there = (cross_modality_clustering(bank[0], ClusterConfig(**config, device=device)) for device in ("cpu", "cuda"))
    for name in ("visible", "infrared", "joint"):
        assert adjusted_rand_score(getattr(here, name), getattr(there, name)) > 0.999


@needs_cuda
def test_faiss_on_the_gpu(bank):
    faiss = pytest.importorskip("faiss")
    if not getattr(faiss, "get_num_gpus", int)():
        pytest.skip("this faiss has no GPU support; install faiss-gpu")
    x = bank[0].features
    assert np.array_equal(knn(x, 20, backend="faiss", device="cuda")[0], knn(x, 20)[0])
