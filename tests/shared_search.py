"Run by torchrun: every process searches a share, and each must end with the table one process would have made."

import sys
from pathlib import Path

import numpy as np
import torch

from vireid_nb._search_kernels import View, _search
from vireid_nb.clustering import ClusterConfig, cross_modality_clustering
from vireid_nb.neighbors import knn, modality_knn
from vireid_nb.processes import rank, start, world
from vireid_nb.synthetic import make_vi_features

start("cpu")
bank, _ = make_vi_features(60, 40, 25, dim=32, seed=4)
same = {"processes": world() == 2}
for name, x in {"several tiles": bank.features, "one sample": bank.features[:1], "copies": np.repeat(bank.features[:3], 30, 0)}.items():
    for backend in ("torch", "faiss"):
        together, alone = knn(x, 20, backend=backend, shared=True), knn(x, 20, backend=backend)
        same[f"{name}, {backend}"] = all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(together, alone))
for backend in ("torch", "faiss"):
    views = (modality_knn(bank.features, bank.modality, 15, 25, backend=backend, shared=shared) for shared in (True, False))
    same[f"modalities, {backend}"] = all(np.array_equal(a, b) for one, other in zip(*views) for a, b in zip(one, other))
x = torch.from_numpy(bank.features)  # the way of an accelerator, through torch on the CPU
views = [View(0, len(x), slice(0, 2), (0, len(x)), 20, np.arange(len(x))), View(0, 2400, slice(0, 1), (0, 2400), 20, np.arange(len(x)))]
together, alone = (_search(x, [2400, len(x)], views, shared=shared) for shared in (True, False))
same["tensors"] = all(torch.equal(a, b) for one, other in zip(together, alone) for a, b in zip(one, other))
for backend in ("pivots", "faiss-ivf"):
    near = [knn(bank.features, 20, backend=backend, shared=shared)[0] for shared in (True, False)]
    same[backend] = np.array_equal(*near)
    views = (modality_knn(bank.features, bank.modality, 15, 25, backend=backend, shared=shared) for shared in (True, False))
    same[f"modalities, {backend}"] = all(np.array_equal(a[0], b[0]) for a, b in zip(*views))
config = ClusterConfig(k1=10, k2=4, joint_k1=20, joint_k2=8)
labels = [cross_modality_clustering(bank, config, shared=shared) for shared in (True, False)]
same["labels"] = all(np.array_equal(getattr(labels[0], name), getattr(labels[1], name)) for name in ("visible", "infrared", "joint"))
Path(sys.argv[1], f"{rank()}.txt").write_text("\n".join(name for name, equal in same.items() if not equal))
