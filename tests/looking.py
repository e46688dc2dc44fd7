"Run folders to look at: real drawn pictures, invented features in which the modality gap closes."
import numpy as np

from vireid_nb.artifacts import Run
from vireid_nb.catalog import load_catalog
from vireid_nb.clustering import ClusterConfig, cross_modality_clustering
from vireid_nb.records import FeatureBank, Modality
from vireid_nb.synthetic import make_vi_features

CLUSTERING = ClusterConfig(k1=10, k2=3, eps=0.5, joint_k1=12, joint_k2=4, joint_eps=0.5)


def features_for(samples, gap, seed=0):
    "One feature a sample, of its person, modality and camera."
    person = {p: i for i, p in enumerate(sorted(samples.pid.unique()))}
    most = [int(samples[samples.modality == m].groupby("pid").size().max()) for m in Modality]
    made, pids = make_vi_features(len(person), *most, dim=32, modality_gap=gap, camera_gap=0.2, noise=0.9, seed=seed)
    stock = {(m, p): iter(np.flatnonzero((made.modality == m) & (pids == p))) for m in (0, 1) for p in person.values()}
    rows = [next(stock[m, person[p]]) for m, p in zip(samples.modality, samples.pid)]
    return FeatureBank(made.features[rows], samples.modality, samples.camid, np.arange(len(samples)))


def made_up_run(root, path, gaps=(1.0, 0.5, 0.2), keep=True, ids=True):
    "A run of one epoch a gap over the training pictures of a SYSU-MM01 folder."
    samples = load_catalog(root, "sysu").train
    kept = samples if ids else samples.assign(pid=-1)
    run = Run.create(path, {"data": {"root": str(root), "name": "sysu"}}, kept)
    for epoch, gap in enumerate(gaps):
        bank = features_for(samples, gap)
        run.save_epoch(epoch, cross_modality_clustering(bank, CLUSTERING), bank if keep else None, phase="joint")
    return run
