"DMIC: the schedules' exact values, memories against their naive forms, resume, switches, and what bad input does."
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from same_run import numbers, same, weights

from vireid_nb.backbone import BackboneConfig, build_backbone
from vireid_nb.catalog import load_catalog
from vireid_nb.clustering import ClusterConfig
from vireid_nb.dmic import ABLATIONS, DmicConfig, dmic_preset
from vireid_nb.hmcl import EntryMemory, HybridMemory, group_nce, winners
from vireid_nb.records import VireidError, seeded_torch
from vireid_nb.schedules import DNC_PRESETS, DncConfig, DynamicNeighborhood
from vireid_nb.synthetic import make_vi_features
from vireid_nb.training import BatchConfig, DataConfig, EngineConfig, load_model, train

# ---- schedules


@pytest.mark.parametrize(
    "name,rows",
    {
        "sysu": {0: (0.6, 6), 10: (0.6 * 0.5**0.2, 7), 25: (0.6 * 0.5**0.5, 10), 49: (0.6 * 0.5**0.98, 18), 50: (0.6, 6), 55: (0.6 * 0.5**0.5, 7), 60: (0.3, 7), 80: (0.3 * 2**0.5, 12), 99: (0.3 * 2**0.975, 18), 100: (0.6, 18)},
        "regdb": {0: (0.3, 6), 25: (0.3 * (2 / 3) ** 0.5, 8), 50: (0.3, 6), 60: (0.2, 7), 80: (0.2 * 1.5**0.5, 9), 100: (0.3, 12)},
    }.items(),
)
def test_schedule_is_the_published_table(name, rows):
    dnc = DNC_PRESETS[name].over(50, 50)
    joint = {"sysu": 32, "regdb": 18}[name]
    for epoch, (eps, k2) in rows.items():
        assert dnc.at(epoch) == ("intra" if epoch < 50 else "inter", pytest.approx(eps, abs=1e-12), k2, joint), epoch


bounds = st.tuples(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.integers(1, 40), st.integers(1, 40)).map(lambda t: (min(t[:2]), max(t[:2]), min(t[2:]), max(t[2:])))


@given(bounds, st.integers(0, 30), st.integers(0, 30), st.floats(0, 1))
def test_schedule_moves_as_said_for_any_number_of_epochs(b, n, m, share):
    if n + m == 0:
        return
    dnc = DncConfig(True, *b, 9, share).over(n, m)
    s = [dnc.at(e) for e in range(n + m)]
    assert [v.phase for v in s] == ["intra"] * n + ["inter"] * m
    assert all(b[0] - 1e-9 <= v.eps <= b[1] + 1e-9 and b[2] <= v.k2 <= b[3] and v.k2_joint == 9 for v in s)
    turn = n + dnc.inter_shrink_epochs
    for part, sign in ((s[:n], -1), (s[n:turn], -1), (s[turn:], 1)):
        assert all(sign * (y.eps - x.eps) >= -1e-12 for x, y in zip(part, part[1:]))
    for phase in (s[:n], s[n:]):
        assert all(x.k2 <= y.k2 for x, y in zip(phase, phase[1:]))
        assert not phase or phase[0].k2 == b[2]
    assert dnc.at(n + m).k2 == b[3]


@pytest.mark.parametrize(
    "values,epochs,says",
    [
        ((0.6, 0.3, 6, 18, 32), {}, "eps from 0.6 to 0.3"),
        ((0.0, 0.3, 6, 18, 32), {}, "eps from 0.0"),
        ((0.3, 1.0, 6, 18, 32), {}, "eps_high < 1"),
        ((float("nan"), 0.6, 6, 18, 32), {}, "eps from nan"),
        ((0.3, 0.6, 0, 18, 32), {}, "k2 from 0"),
        ((0.3, 0.6, 18, 6, 32), {}, "k2 from 18 to 6"),
        ((0.3, 0.6, 6, 18, 0), {}, "k2_joint is 0"),
        ((0.3, 0.6, 6, 18, 32), {"intra_epochs": -1}, "negative"),
        ((0.3, 0.6, 6, 18, 32), {"inter_epochs": 5}, "10 of 5"),
        ((0.3, 0.6, 6, 18, 32), {"inter_shrink_epochs": -1}, "-1 of 50"),
    ],
)
def test_bad_bounds_are_refused(values, epochs, says):
    with pytest.raises(VireidError, match=says):
        DynamicNeighborhood(*values, **epochs)


def test_bad_bounds_are_refused_before_anything_runs():
    with pytest.raises(VireidError, match="eps from 0.7 to 0.6"):
        DmicConfig(dnc=DncConfig(eps_low=0.7))
    for epoch in (-1, 101):
        with pytest.raises(VireidError, match=f"epoch {epoch} of 100"):
            DNC_PRESETS["sysu"].over(50, 50).at(epoch)


# ---- memories


@given(st.integers(0, 2**20), st.integers(1, 12), st.integers(1, 30), st.sampled_from([0.05, 0.5]))
def test_group_nce_is_the_formula(seed, b, m, temperature):
    g = torch.Generator().manual_seed(seed)
    entries = F.normalize(torch.randn(m, 8, generator=g), dim=1)
    of = torch.randint(-1, 4, (m,), generator=g)
    present = of[of >= 0].unique()
    y = torch.cat([present, torch.tensor([-1])])[torch.randint(0, len(present) + 1, (b,), generator=g)]
    emb = torch.randn(b, 8, generator=g)
    terms = []
    for f, c in zip(F.normalize(emb, dim=1).double(), y.tolist()):
        if c >= 0:
            logs = torch.log_softmax(entries.double() @ f / temperature, 0)
            terms.append(-logs[of == c].mean())
    want = torch.stack(terms).mean() if terms else torch.tensor(0.0)
    assert torch.allclose(group_nce(emb, y, entries, of, temperature).double(), want.double(), atol=1e-4)


@given(st.integers(0, 2**20), st.lists(st.integers(-1, 6), max_size=40))
def test_winners_are_one_for_each_slot(seed, slots):
    got, rows = winners(torch.tensor(slots, dtype=torch.int64), torch.Generator().manual_seed(seed))
    assert got.tolist() == sorted({s for s in slots if s >= 0}) and [slots[r] for r in rows.tolist()] == got.tolist()


@pytest.mark.parametrize("reading,outliers,size", [("all", False, 17), ("all", True, 20), ("sampled", False, 2)])
def test_instance_entries_hold_what_they_say(reading, outliers, size):
    bank, pids = make_vi_features(2, 5, 5, dim=8, seed=0)
    y = pids.copy()
    y[[0, 7, 12]] = -1
    noise = torch.ones(20, dtype=torch.bool) if outliers else None
    h = HybridMemory(bank.features, y, bank.modality, seeded_torch(0, "t"), reading=reading, outliers=noise)
    memory = h.level["instance"]
    assert len(memory) == size and len(h.level["cluster"]) == 2
    rows = torch.arange(20)
    taken = h.slot[rows] >= 0
    assert taken.sum() == (size if reading == "all" else 17)
    emb = torch.randn(20, 8, generator=seeded_torch(1, "t"))
    before = memory.entries.clone()
    h.update(emb, rows, seeded_torch(2, "t"))
    assert ((memory.entries != before).any(1)).all()
    assert torch.allclose(memory.entries.norm(dim=1), torch.ones(size))
    if reading == "all":
        assert torch.allclose(memory.entries[h.slot[taken]], F.normalize(emb[taken], dim=1))
    assert all(torch.isfinite(v) for v in h.losses(emb, rows).values())


def test_an_outlier_entry_pushes_and_never_pulls():
    entries, emb = torch.eye(3), torch.tensor([[1.0, 1.0, 1.0]])
    without = EntryMemory(entries[:2], [0, 1]).loss(emb, [0])
    beside = EntryMemory(entries, [0, 1, -1]).loss(emb, [0])
    assert torch.isclose(without, torch.log(torch.tensor(2.0))) and torch.isclose(beside, torch.log(torch.tensor(3.0)))


# ---- training


def small(root, runs, name="run", data="sysu", cluster={}, **more):
    "DMIC in three short epochs on the tiny network, from random weights."
    base = dmic_preset("synth")
    return replace(
        base,
        **{
            "data": DataConfig(root=str(root), name=data, size=(96, 48)),
            "model": BackboneConfig(name="tiny", weights="none"),
            "cluster": replace(base.cluster, **{"k1": 8, "joint_k1": 12, "min_samples": 2, **cluster}),
            "dnc": DncConfig(eps_low=0.5, eps_high=0.7, k2_low=2, k2_high=4, k2_joint=4, shrink=0.5),
            "batch": BatchConfig(n_ids=3, n_instances=2, iterations=3),
            "engine": EngineConfig(device="cpu", progress=False),
            "intra_epochs": 1,
            "joint_epochs": 2,
            "runs": str(runs),
            "name": name,
            **more,
        },
    )


def as_csv(root, goal, camid):
    "The pictures of `root` as a CSV data set whose cameras are `camid(table)`."
    table = load_catalog(root, "sysu").train
    for p in table.path:
        (goal / p).parent.mkdir(parents=True, exist_ok=True)
        os.link(root / p, goal / p)
    table.assign(camid=camid(table))[["path", "modality", "camid", "pid"]].to_csv(goal / "index.csv", index=False)
    return goal


@pytest.fixture(scope="module")
def straight(sysu_root, tmp_path_factory):
    "One uninterrupted run that several tests compare with."
    return train(small(sysu_root, tmp_path_factory.mktemp("runs"), keep_features=True))


def test_a_run_records_its_schedule_and_losses(straight):
    got = [straight.labels(e).info["schedule"] for e in straight.epochs]
    assert [s["phase"] for s in got] == ["intra", "inter", "inter", "inter"]
    assert np.allclose([s["eps"] for s in got], [0.7, 0.7, 0.5, 0.7]) and [s["k2"] for s in got] == [2, 2, 3, 4]
    info = straight.labels(1).info
    assert (info["k2"], info["joint_k2"], info["intra_groups"], info["joint_groups"]) == (2, 4, "camera", "camera")
    losses = straight.metrics("train").filter(regex="^loss").notna().any()
    assert set(losses.index[losses]) == {f"loss.{a}_{b}" for a in ("visible", "infrared", "joint") for b in ("cluster", "instance")}


def test_stopped_and_resumed_is_bit_equal(straight, sysu_root, tmp_path):
    class Stop(Exception):
        pass

    def stop(run, entry):
        if (entry["event"], entry["epoch"]) == ("labels", 2):
            raise Stop

    config = small(sysu_root, tmp_path, keep_features=True)
    with pytest.raises(Stop):
        train(config, callbacks=[stop])
    run = train(config, resume=True)
    assert same(weights(straight), weights(run)) and numbers(straight) == numbers(run)


def changed(config, row):
    "The configuration with an ablation's dotted keys set."
    for key, value in row.items():
        part, _, name = key.partition(".")
        config = replace(config, **{part: replace(getattr(config, part), **{name: value})})
    return config


@pytest.mark.parametrize("row,joint", [("cluster in phase 1", set()), ("+ cluster in phase 2", {"cluster"})])
def test_the_losses_table_trains_what_it_says(sysu_root, tmp_path, row, joint):
    config = changed(small(sysu_root, tmp_path, eval_every=0, joint_epochs=1), ABLATIONS["losses"][row])
    run = train(replace(config, batch=replace(config.batch, iterations=1)))
    first, second = ({k.removeprefix("loss.") for k in e["loss"]} for e in run.events() if e["event"] == "train")
    assert {n.split("_")[1] for n in first} == ({"cluster"} if row == "cluster in phase 1" else {"cluster", "instance"})
    assert {n.split("_")[1] for n in second if n.startswith("joint")} == joint


@pytest.mark.parametrize("row", ABLATIONS["clustering"])
def test_the_clustering_table_clusters_as_it_says(row):
    bank, _ = make_vi_features(6, 8, 8, dim=16, seed=0)
    info = changed(small("", ""), ABLATIONS["clustering"][row]).make_method().cluster(bank, 1).info
    assert (info["intra_groups"], info["joint_groups"]) == (("camera", "camera") if "MIE" in row else ("none", "none"))
    fixed = small("", "").cluster
    assert (info["eps"], info["joint_eps"]) == ((0.7, 0.7) if "DNC" in row else (fixed.eps, fixed.joint_eps))
    assert info["joint_k2"] == (4 if "DNC" in row else fixed.joint_k2)


def test_the_losses_table_in_weights():
    both, one = {"cluster": 1.0, "instance": 0.1}, {"cluster": 1.0}
    got = [changed(DmicConfig(), row).hmcl for row in ABLATIONS["losses"].values()]
    assert [(h.weights("intra"), h.weights("joint")) for h in got] == [(one, one), (both, both), (both, one), (both, both)]
    assert [h.phase2 for h in got] == ["none", "none", "cluster", "both"]


LETTER = dict(among="batch", weighing="sum", joint_start="samples")


@pytest.mark.parametrize("reading,averaging,more", [("all", "flat", {}), ("sampled", "nested", {}), ("pooled", "nested", LETTER)])
def test_readings_and_averagings_train(sysu_root, tmp_path, reading, averaging, more):
    config = small(sysu_root, tmp_path, cluster={"averaging": averaging}, intra_epochs=0, joint_epochs=1, eval_every=0)
    run = train(replace(config, hmcl=replace(config.hmcl, reading=reading, outliers=True, normalise=False, **more)))
    assert run.metrics("train")["loss.joint_instance"].notna().all() and run.labels(0).info["averaging"] == averaging


# ---- bad input


def test_without_camera_numbers_modalities_serve_and_it_is_said_once(sysu_root, tmp_path, caplog):
    root = as_csv(sysu_root, tmp_path / "data", lambda t: -1)
    run = train(small(root, tmp_path, data="csv", joint_epochs=1))
    assert caplog.text.count("no picture has a camera number") == 1 and "count as one camera" not in caplog.text
    assert {run.labels(e).info["joint_groups"] for e in run.epochs} == {"modality"}


def test_without_or_with_one_camera_it_is_the_modality_invariant_form():
    bank, _ = make_vi_features(6, 8, 8, dim=16, seed=0)
    by_modality = replace(small("", "").cluster, intra_groups="none", joint_groups="modality")
    want = small("", "", cluster=vars(by_modality)).make_method().cluster(bank, 1)
    for camid in (np.full(96, -1), bank.modality, np.full(96, 3)):
        got = small("", "").make_method().cluster(replace(bank, camid=camid), 1)
        assert all(np.array_equal(getattr(want, k), getattr(got, k)) for k in ("visible", "infrared", "joint"))


def test_a_camera_with_one_picture(sysu_root, tmp_path):
    root = as_csv(sysu_root, tmp_path / "data", lambda t: np.r_[8, t.camid[1:]])
    run = train(small(root, tmp_path, data="csv", intra_epochs=0, joint_epochs=1))
    assert run.metrics("train")["steps"].iloc[-1] > 0


@pytest.mark.parametrize("intra,joint,phases", [(0, 1, ["inter", "inter"]), (1, 0, ["intra", "intra"])])
def test_a_phase_of_no_epochs(sysu_root, tmp_path, intra, joint, phases):
    run = train(small(sysu_root, tmp_path, intra_epochs=intra, joint_epochs=joint))
    assert [run.labels(e).info["schedule"]["phase"] for e in run.epochs] == phases
    assert any("joint" in k for k in run.metrics("train")) == (joint > 0)


def test_no_epochs_at_all_are_refused(sysu_root, tmp_path):
    with pytest.raises(VireidError, match="0 intra and 0 inter"):
        train(small(sysu_root, tmp_path, intra_epochs=0, joint_epochs=0))


def test_an_eps_that_leaves_no_cluster_is_said_and_changes_nothing(sysu_root, tmp_path, caplog):
    config = small(sysu_root, tmp_path, joint_epochs=1, dnc=DncConfig(eps_low=1e-4, eps_high=1e-4, k2_low=1, k2_high=1, k2_joint=1))
    run = train(config)
    assert "no visible cluster, so nothing learns from it; widen dnc.eps_low" in caplog.text and "no cluster to learn from" in caplog.text
    assert same(build_backbone(config.model, seed=config.seed).state_dict(), load_model(run)[0].state_dict())


def test_presets():
    assert (dmic_preset("sysu").cluster.k1, dmic_preset("regdb").cluster.k1) == (40, 38)
    assert all(isinstance(dmic_preset(d), DmicConfig) for d in ("sysu", "regdb", "llcm", "folder", "csv", "synth"))
    assert dmic_preset("sysu").hmcl.instance == 0.1 and dmic_preset("sysu").momentum == 0
    with pytest.raises(VireidError, match="no preset 'market'"):
        dmic_preset("market")
    assert ClusterConfig().joint_groups == "modality"  # MIE is DMIC's, not everybody's
