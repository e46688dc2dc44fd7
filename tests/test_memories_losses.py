"Cluster memories and losses against the recorded published program, slow oracles, and properties."
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vireid_nb.losses import batch_hard_triplet, mmd2
from vireid_nb.memories import RULES, ClusterMemory, cluster_means, cluster_nce, joint_means, updated_memory
from vireid_nb.records import VireidError, seeded_torch

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    "The arrays of one recorded case as tensors."
    return {k: torch.as_tensor(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}


def gradient(loss, x):
    (g,) = torch.autograd.grad(loss, x)
    return g


# ---------------------------------------------------------------------------------------------- memory, recorded


@pytest.mark.parametrize("hard", (0, 1))
@pytest.mark.parametrize("case", (0, 1))
def test_memory_equals_published(hard, case):
    z = golden(f"e_memory_hard_{hard}_{case}")
    memory = ClusterMemory(z["memory_before"], temperature=z["temp"].item(), momentum=z["momentum"].item(), update="hard" if hard else "sequential")
    x = z["inputs"].clone().requires_grad_()
    loss = memory.loss(x, z["labels"])
    memory.update(x, z["labels"])  # before backward: the graph keeps the old memory
    assert abs(loss.item() - z["loss"].item()) < 2e-6
    torch.testing.assert_close(gradient(loss, x), z["grad_inputs"], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(memory.features, z["memory_after"], atol=1e-6, rtol=0)


def test_shared_memory_and_the_published_order_effect():
    z = golden("e_memory_shared_two_losses")
    tau, m, old = z["temp"].item(), z["momentum"].item(), F.normalize(z["memory_before"], dim=1)
    memory = ClusterMemory(old, temperature=tau, momentum=m)
    ir, rgb = (z[k].clone().requires_grad_() for k in ("inputs_ir", "inputs_rgb"))
    loss_ir, loss_rgb = memory.loss(ir, z["labels_ir"]), memory.loss(rgb, z["labels_rgb"])
    assert abs(loss_ir.item() - z["loss_ir"].item()) < 2e-6 and abs(loss_rgb.item() - z["loss_rgb"].item()) < 2e-6
    memory.update(rgb, z["labels_rgb"])
    after_visible = memory.features
    memory.update(ir, z["labels_ir"])
    torch.testing.assert_close(memory.features, z["memory_after"], atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(loss_rgb, rgb), z["grad_rgb"], atol=2e-6, rtol=1e-5)

    ours = gradient(loss_ir, ir)
    assert (ours - z["grad_ir"]).abs().max() > 0.1  # the published infrared gradient saw the visible update ...
    softmax = (F.normalize(ir, dim=1) @ old.T / tau).softmax(1).detach()  # ... while its softmax did not
    pull = (softmax - F.one_hot(z["labels_ir"], len(old))) / tau / len(ir)
    theirs = gradient((F.normalize(ir, dim=1) @ after_visible.T * pull).sum(), ir)
    torch.testing.assert_close(theirs, z["grad_ir"], atol=2e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- memory, rules


def naive_update(centers, emb, labels, momentum, rule):
    centers, emb = centers.clone(), F.normalize(emb, dim=1)
    seen = [i for i, y in enumerate(labels.tolist()) if y >= 0]
    unit = lambda v: v / v.norm()
    if rule == "sequential":
        for i in seen:
            centers[labels[i]] = unit(momentum * centers[labels[i]] + (1 - momentum) * emb[i])
        return centers
    for y in {int(labels[i]) for i in seen}:
        own = [i for i in seen if labels[i] == y]
        target = emb[own].mean(0) if rule == "mean" else emb[min(own, key=lambda i: float(emb[i] @ centers[y]))]
        centers[y] = unit(momentum * centers[y] + (1 - momentum) * target)
    return centers


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(1, 12), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from(["sequential", "hard", "mean"]))
def test_update_equals_the_walk(seed, batch, clusters, momentum, rule):
    g = seeded_torch(seed)
    centers = F.normalize(torch.randn(clusters, 8, generator=g), dim=1)
    emb, labels = torch.randn(batch, 8, generator=g), torch.randint(-1, clusters, (batch,), generator=g)
    before = centers.clone()
    got = updated_memory(centers, emb, labels, momentum=momentum, rule=rule)
    torch.testing.assert_close(got, naive_update(centers, emb, labels, momentum, rule), atol=2e-6, rtol=0)
    assert torch.equal(centers, before)


def test_random_rule_takes_one_sample_of_each_cluster():
    g = seeded_torch(1)
    centers, emb = F.normalize(torch.randn(5, 8, generator=g), dim=1), torch.randn(40, 8, generator=g)
    labels = torch.arange(40) % 4  # cluster 4 is not in the batch
    draw = lambda seed: updated_memory(centers, emb, labels, momentum=0.9, rule="random", generator=seeded_torch(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(0)[4], centers[4])
    similarity = draw(0)[:4] @ F.normalize(emb, dim=1).T
    best = similarity.max(1)
    assert (best.values > 1 - 1e-5).all() and (labels[best.indices] == torch.arange(4)).all()


@pytest.mark.parametrize("rule", RULES)
def test_update_after_loss_leaves_the_gradient_alone(rule):
    g = seeded_torch(2)
    memory = ClusterMemory(torch.randn(6, 8, generator=g), update=rule)
    x, y = torch.randn(12, 8, generator=g).requires_grad_(), torch.arange(12) % 6
    alone = gradient(memory.loss(x, y), x)
    loss = memory.loss(x, y)
    memory.update(x, y, generator=seeded_torch(0))
    assert torch.equal(gradient(loss, x), alone)
    assert not memory.features.requires_grad


def test_memory_state_and_float32_under_autocast():
    g = seeded_torch(3)
    memory, x, y = ClusterMemory(torch.randn(6, 8, generator=g)), torch.randn(12, 8, generator=g), torch.arange(12) % 6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = memory.loss(x, y)
        memory.update(x, y)
    other = ClusterMemory(torch.ones(6, 8))
    other.load_state_dict(memory.state_dict())
    assert inside.dtype == other.features.dtype == torch.float32 and torch.equal(other.features, memory.features)
    torch.testing.assert_close(memory.features.norm(dim=1), torch.ones(6))


def test_nothing_to_learn_from():
    memory = ClusterMemory(torch.eye(4))
    x = torch.ones(3, 4, requires_grad=True)
    for emb, labels in ((x, [-1, -1, -1]), (x[:0], [])):
        loss = memory.loss(emb, torch.tensor(labels, dtype=torch.long))
        assert loss.item() == 0 and gradient(loss, x).abs().sum() == 0
        memory.update(emb, torch.tensor(labels, dtype=torch.long))
    assert torch.equal(memory.features, torch.eye(4))
    empty = ClusterMemory(torch.zeros(0, 4))  # an epoch that is all noise
    assert empty.loss(x, [-1] * 3).item() == 0
    empty.update(x, [-1] * 3)
    assert empty.features.shape == (0, 4)


@pytest.mark.parametrize("rule", RULES)
def test_bad_batches_are_refused_and_leave_no_trace(rule):
    memory = ClusterMemory(torch.eye(4), update=rule)
    x = torch.ones(3, 4)
    g = seeded_torch(0)
    for emb, labels in ((x * torch.nan, [0, 1, 2]), (x, [0, 1, 4]), (x, [0, 1, -2]), (x, [0, 1])):
        with pytest.raises(VireidError):
            memory.update(emb, labels, generator=g)
        with pytest.raises(VireidError):
            memory.loss(emb, labels)
    assert torch.equal(memory.features, torch.eye(4))


def test_means():
    g = seeded_torch(4)
    f, y, m = torch.randn(60, 8, generator=g), torch.randint(-1, 5, (60,), generator=g), torch.randint(0, 2, (60,), generator=g)
    m[y == 3] = 1  # infrared only
    plain = torch.stack([F.normalize(f[y == k].mean(0), dim=0) for k in range(5)])
    torch.testing.assert_close(cluster_means(f, y), plain)
    joint = torch.stack([F.normalize(torch.stack([f[(y == k) & (m == v)].mean(0) for v in range(2) if ((y == k) & (m == v)).any()]).mean(0), dim=0) for k in range(5)])
    torch.testing.assert_close(joint_means(f, y, m), joint)
    torch.testing.assert_close(cluster_means(f.numpy(), y.numpy(), 5), plain)
    with pytest.raises(VireidError, match="no sample"):
        cluster_means(f, y, 6)


def test_per_sample_values_average_to_the_loss():
    g = seeded_torch(5)
    x, y, c = torch.randn(20, 8, generator=g), torch.randint(-1, 4, (20,), generator=g), F.normalize(torch.randn(4, 8, generator=g), dim=1)
    each = cluster_nce(x, y, c, reduction="none")
    assert (each[y < 0] == 0).all() and (each[y >= 0] > 0).all()
    torch.testing.assert_close(each[y >= 0].mean(), cluster_nce(x, y, c))


# ---------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("case", range(3))
def test_triplet_equals_published(case):
    z = golden(f"e_triplet_{case}")
    x = z["inputs"].clone().requires_grad_()
    loss = batch_hard_triplet(x, z["labels"], z["margin"].item())
    assert abs(loss.item() - z["loss"].item()) < 1e-6
    torch.testing.assert_close(gradient(loss, x), z["grad"], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("case", range(3))
def test_mmd_equals_published(case):
    z = golden(f"e_mmd_{case}")
    x = z["source"].clone().requires_grad_()
    loss = mmd2(x, z["target"])
    assert abs(loss.item() - z["loss"].item()) < 2e-6
    torch.testing.assert_close(gradient(loss, x), z["grad_source"], atol=1e-6, rtol=1e-4)


def test_mmd_of_identical_samples_is_zero_with_a_zero_gradient():
    for n, m in ((4, 4), (1, 1), (2, 5)):
        x = torch.randn(1, 16, generator=seeded_torch(0)).expand(n, 16).clone().requires_grad_()
        loss = mmd2(x, x.detach()[:1].expand(m, 16))
        assert loss.item() == 0 and (gradient(loss, x) == 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6))
def test_mmd_is_symmetric_not_negative_and_scale_free(seed, n, m):
    g = seeded_torch(seed)
    s, t = torch.randn(n, 5, generator=g), torch.randn(m, 5, generator=g)
    value = mmd2(s, t).item()
    assert value > -1e-5
    assert abs(value - mmd2(t, s).item()) < 1e-5 and abs(value - mmd2(3 * s, 3 * t).item()) < 1e-4


def test_triplet_against_references_and_without_triplets():
    g = seeded_torch(6)
    x, y = torch.randn(10, 8, generator=g), torch.arange(10) % 3
    r, ry = torch.randn(7, 8, generator=g), torch.tensor([0, 1, 0, 1, 0, 1, -1])
    d = torch.cdist(x, r)
    want = [max(0.0, (d[i][ry == y[i]].max() - d[i][(ry >= 0) & (ry != y[i])].min() + 0.3).item()) if y[i] < 2 else 0.0 for i in range(10)]
    got = batch_hard_triplet(x, y, 0.3, r, ry, reduction="none")
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert abs(batch_hard_triplet(x, y, 0.3, r, ry).item() - sum(want) / (y < 2).sum().item()) < 1e-5
    x.requires_grad_()
    for labels in (torch.zeros(10, dtype=torch.long), torch.full((10,), -1)):
        loss = batch_hard_triplet(x, labels)
        assert loss.item() == 0 and (gradient(loss, x) == 0).all()
    assert batch_hard_triplet(x[:0], y[:0]).item() == 0
