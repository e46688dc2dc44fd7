"Methods beside MMM and DMIC: what one step of PGM does, that every loss teaches, and that a run goes on after a kill with what it holds beside the network."
import importlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from same_run import numbers, same, weights

from vireid_nb.ablation import override
from vireid_nb.asking import Ask, ask_steps
from vireid_nb.memories import ClusterMemory
from vireid_nb.pclhd import pclhd_preset
from vireid_nb.pgm import cross_asks, matched_clusters
from vireid_nb.records import Modality, PseudoLabels, VireidError
from vireid_nb.synthetic import make_vi_features
from vireid_nb.training import BatchConfig, intra_pairs, label_samples, open_session, train

GOLDEN = Path(__file__).parent / "golden"
NEW = ("pgm", "adca", "gur", "pclhd", "salcr", "bmil")


class Given:
    "A learner whose network returns given embeddings, for one batch."

    def __init__(self, visible, infrared):
        self.emb = SimpleNamespace(visible=torch.from_numpy(visible).requires_grad_(), infrared=torch.from_numpy(infrared).requires_grad_())
        self.config = SimpleNamespace(seed=0)

    def batches(self, pairs, epoch, stream):
        return (SimpleNamespace(visible=v, infrared=r) for v, r in pairs)

    def embed(self, batch):
        return self.emb


@pytest.mark.parametrize("rule", ["sequential", "hard"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_pgm_step_golden(rule, epoch):
    with np.load(GOLDEN / "p_pgm_accl_step.npz") as held:
        g = {k: held[k] if held[k].ndim else held[k].item() for k in held.files}
    named = lambda name: g[f"{rule}_epoch{epoch}_{name}"]
    learner, n = Given(g["emb_visible"], g["emb_infrared"]), len(g["y_visible"])
    memories = {k: ClusterMemory(g[f"entries_{k}"], temperature=g["temperature"], momentum=g["momentum"], update=rule) for k in ("visible", "infrared")}
    for k, memory in memories.items():
        memory.features = torch.from_numpy(g[f"entries_{k}"])
    own = np.concatenate([g["y_visible"], g["y_infrared"]])
    spaces = {"infrared": np.concatenate([g["v2r"][g["y_visible"]], g["y_infrared"]]), "visible": np.concatenate([g["y_visible"], g["r2v"][g["y_infrared"]]])}
    across = cross_asks(spaces, g["cross_weight"], "alternate", epoch)
    asks = [Ask(Modality.INFRARED, "infrared", own), Ask(Modality.VISIBLE, "visible", own), *across]
    steps = ask_steps(learner, memories, asks, [(np.arange(n), n + np.arange(len(g["y_infrared"])))], 0, "intra")
    losses = next(steps)
    sum(losses.values()).backward()
    next(steps, None)  # the memories follow
    for name, value in (("infrared", named("loss_infrared")), ("visible", named("loss_visible")), (across[0].name, g["cross_weight"] * named("loss_cross"))):
        assert losses[name].item() == pytest.approx(value, abs=5e-7, rel=2e-7), name  # 7.8 in float32 is no finer than 5e-7
    for k, memory in memories.items():
        assert (memory.features - torch.from_numpy(named(f"entries_{k}"))).abs().max() < 1e-6, k
    free = ("visible", "infrared")[epoch]  # whose own memory is asked once; the other gradient is the program's defect: taken at entries moved already
    assert (getattr(learner.emb, free).grad - torch.from_numpy(named(f"grad_{free}"))).abs().max() < 5e-7
    moved = ("infrared", "visible")[epoch]
    assert (getattr(learner.emb, moved).grad - torch.from_numpy(named(f"grad_{moved}"))).abs().max() > 1e-4


def small(config, root, out, intra=1, joint=2):
    return replace(config, data=replace(config.data, root=str(root)), batch=BatchConfig(3, 4, 2), intra_epochs=intra, joint_epochs=joint, runs=str(out), eval_every=0)


@pytest.mark.parametrize("name", ["baseline", "mmm", "dmic", *NEW])
def test_every_loss_has_a_gradient(name, sysu_root, tmp_path):
    module = importlib.import_module(f"vireid_nb.{name}")
    config = small(getattr(module, f"{name}_preset")("synth"), sysu_root, tmp_path)
    method, seen = config.make_method(), {}
    session = open_session(config, (), False)
    for epoch in range(3):
        bank, labels = label_samples(session, method, epoch)
        if epoch in (0, 1):
            method.begin(session.learner, labels, epoch)
        learnt = [p for p in session.learner.model.parameters() if p.requires_grad]
        for losses in method.steps(session.learner, bank, labels, epoch):
            for k, loss in losses.items():
                pulls = torch.autograd.grad(loss, learnt, retain_graph=True, allow_unused=True)
                seen[k] = max(seen.get(k, 0.0), max(float(p.abs().max()) for p in pulls if p is not None))
    assert len(seen) >= 2 and all(v > 0 for v in seen.values()), seen


def test_a_killed_pclhd_run_goes_on_with_its_averaged_network(sysu_root, tmp_path):
    config = small(pclhd_preset("synth"), sysu_root, tmp_path / "whole")
    whole = train(config)

    def stop(run, entry):
        if entry["event"] == "train" and entry["epoch"] == 2:
            raise KeyboardInterrupt

    parts = replace(config, runs=str(tmp_path / "parts"))
    with pytest.raises(KeyboardInterrupt):
        train(parts, callbacks=(stop,))
    resumed = train(parts, resume=True)
    assert any(k.startswith("averaged.") for k in weights(whole))
    assert same(weights(whole), weights(resumed)) and numbers(whole) == numbers(resumed)
    assert {*resumed.labels(2).spaces} == {"visible", "infrared"}


@pytest.mark.parametrize("name", NEW)
def test_presets_and_ablations_name_what_there_is(name):
    module = importlib.import_module(f"vireid_nb.{name}")
    preset = getattr(module, f"{name}_preset")
    configs = {data: preset(data) for data in module.PRESETS}
    assert {"sysu", "regdb", "llcm", "folder", "csv", "synth"} <= {*configs}
    assert all(c.method == name and type(c.make_method()).__name__.lower() == name for c in configs.values())
    assert (configs["regdb"].cluster.eps, configs["regdb"].batch.iterations, configs["sysu"].cluster.eps) == (0.3, 100, 0.6)
    for table in module.ABLATIONS.values():
        rows = [override(configs["synth"], values) for values in table.values()]
        assert all(a != b for i, a in enumerate(rows) for b in rows[:i])  # no two rows are the same run
    with pytest.raises(VireidError, match="no preset"):
        preset("market")


def test_any_number_of_clusters_on_either_side_is_matched():
    bank, pids = make_vi_features(6, 30, 3, dim=16, seed=0)
    many = np.arange((bank.modality == 0).sum()) // 4  # 45 visible clusters of 6 people
    for visible, infrared in ((many, pids[bank.modality == 1]), (pids[bank.modality == 0], np.arange(18)), (np.full(180, -1), pids[bank.modality == 1]), (np.zeros(180, int), np.zeros(18, int))):
        labels = matched_clusters(bank, PseudoLabels(visible, infrared, np.full(len(bank), -1), bank.modality))
        asked = labels.spaces["infrared"][bank.modality == 0][visible >= 0]
        assert (asked >= 0).all() and asked.max(initial=-1) <= infrared.max()


def test_a_batch_may_hold_more_infrared_identities():
    bank, pids = make_vi_features(12, 4, 4, dim=16, seed=0)
    labels = PseudoLabels(pids[bank.modality == 0], pids[bank.modality == 1], pids, bank.modality)
    for more, infrared in ((0, 3), (9, 9)):
        learner = SimpleNamespace(config=SimpleNamespace(batch=BatchConfig(3, 2, 5, infrared_ids=more)), sampler=lambda name, epoch: np.random.default_rng(0))
        pairs = intra_pairs(learner, bank, labels, 0)
        assert [(len({*pids[v]}), len({*pids[r]})) for v, r in pairs] == [(3, infrared)] * 5
