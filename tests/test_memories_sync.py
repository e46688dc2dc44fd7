"""No training step asks a device for an answer: on a pretended device everywhere, on CUDA where there is one.

The pretended device is the CPU with a memory: what goes through `on_device`, and all that is computed from it, is far away, and an operation whose result or size depends on a far value fails.
It knows nothing of copies, which the CUDA tests cover.
"""
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from same_run import numbers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vireid_nb import records, training
from vireid_nb.backbone import BackboneConfig
from vireid_nb.baseline import baseline_preset
from vireid_nb.dmic import dmic_preset
from vireid_nb.engine import Engine, EngineConfig, load_checkpoint, save_checkpoint
from vireid_nb.hmcl import HybridMemory
from vireid_nb.memories import RULES, cluster_nce, updated_memory
from vireid_nb.mmm import mmm_preset
from vireid_nb.records import VireidError, as_numpy, on_device, seeded, seeded_torch
from vireid_nb.training import BatchConfig, DataConfig, train

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the same steps run on the pretended one")
ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_consecutive", "unique_dim", "equal", "is_nonzero"}


class Faraway(TorchDispatchMode):
    "Raises when a far tensor is asked for a value."

    def __init__(self):
        super().__init__()
        self.far = {}  # storages by their address; kept, so that no address is used twice

    def mark(self, x):
        self.far[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    def holds(self, x):
        return isinstance(x, torch.Tensor) and x.untyped_storage()._cdata in self.far

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, inputs = func.overloadpacket.__name__, [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(map(self.holds, inputs)):
            assert name not in ASKING, f"{name} asks the device"
            masks = [x for x in inputs[1:] if x.dtype in (torch.bool, torch.uint8)] if name in ("index", "index_put", "index_put_") else []
            assert not masks, f"{name} with a mask asks the device how much there is"
        out = func(*args, **(kwargs or {}))
        if any(map(self.holds, inputs)):
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.mark(x)
        return out


@pytest.fixture
def faraway(monkeypatch):
    "The pretended device; what goes through `on_device` is there."
    device = Faraway()

    def fetched(x, dtype=None):
        assert not device.holds(x), "as_numpy fetches from the device"
        return as_numpy(x, dtype)

    stand_ins = {"on_device": lambda x, _: device.mark(torch.as_tensor(x).clone()), "at_hand": lambda x: not device.holds(x), "as_numpy": fetched}
    for name, module in list(sys.modules.items()):
        for name_in, stand_in in stand_ins.items() if name.startswith("vireid_nb.") and module is not records else ():
            if hasattr(module, name_in):
                monkeypatch.setattr(module, name_in, stand_in)
    return device


def test_the_pretended_device_notices(faraway):
    x = faraway.mark(torch.arange(4.0))
    with faraway:
        x.cumsum(0)[torch.tensor([1, 2])].sum()  # asks nothing
        for asks in (lambda: x.sum().item(), lambda: bool((x > 9).any()), lambda: x[x > 1], lambda: (x + 1).nonzero(), lambda: int(x.max()), lambda: x.view(2, 2).sum(1).long().unique()):
            with pytest.raises(AssertionError, match="asks the device"):
                asks()


def batch(seed=0, n=24, k=6, dim=8):
    g = seeded_torch(seed)
    return F.normalize(torch.randn(k, dim, generator=g), dim=1), torch.randn(n, dim, generator=g), seeded(seed).integers(-1, k, n)


@pytest.mark.parametrize("rule", RULES)
def test_memories_ask_nothing_and_give_the_same(faraway, rule):
    centers, emb, y = batch()
    want = updated_memory(centers, emb, y, rule=rule, generator=seeded_torch(1)), cluster_nce(emb, y, centers)
    faraway.mark(emb), faraway.mark(centers)
    with faraway:
        got = updated_memory(centers, emb, y, rule=rule, generator=seeded_torch(1)), cluster_nce(emb, y, centers)
    assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_instance_memories_ask_nothing(faraway):
    _, features, y = batch(3, 40)
    y = np.unique(y, return_inverse=True)[1] - 1
    rows = seeded(3).integers(0, 40, 24)
    emb = faraway.mark(torch.randn(24, 8, generator=seeded_torch(4)).requires_grad_())
    for how in (dict(reading="all"), dict(reading="pooled"), dict(reading="pooled", among="batch"), dict(reading="sampled"), dict(momentum=0.3), dict(normalise=False)):
        memory = HybridMemory(features, y, np.arange(40) % 2, seeded_torch(0), **how)
        with faraway:
            sum(memory.losses(emb, rows).values()).backward()
            memory.update(emb, rows, seeded_torch(1))


# ---------------------------------------------------------------------------------------------- whole steps


def short(method, root, runs, device="cpu", **engine):
    "Three short stages of a method on the tiny network."
    base = {"baseline": baseline_preset, "mmm": mmm_preset, "mmm-released": lambda data: mmm_preset(f"{data}-released"), "dmic": dmic_preset}[method]("synth")
    config = replace(
        base,
        data=DataConfig(root=str(root), name="sysu", size=(96, 48)),
        model=BackboneConfig(name="tiny", weights="none"),
        cluster=replace(base.cluster, k1=8, k2=2, eps=0.6, joint_k1=12, joint_k2=4, joint_eps=0.7, min_samples=2),
        augment=replace(base.augment, erase=0.5, visible_gray=True),
        batch=BatchConfig(n_ids=3, n_instances=2, iterations=4),
        engine=EngineConfig(device=device, progress=False, **engine),
        runs=str(runs),
        name=method,
        intra_epochs=1,
        joint_epochs=1,
    )
    if method.startswith("mmm"):
        config = replace(config, sca=replace(config.sca, inter_from=1), align=replace(config.align, epochs=2, plain_epochs=1, n_ids=3, n_instances=2))
    return config


METHODS = ("baseline", "mmm", "mmm-released", "dmic")


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_epoch_of_steps_asks_nothing(faraway, monkeypatch, sysu_root, tmp_path, method):
    learn, learned = training.learn, []

    def watched(*args):
        with faraway:
            learned.append(learn(*args))
        return learned[-1]

    monkeypatch.setattr(training, "learn", watched)
    train(short(method, sysu_root, tmp_path, fused=True))
    assert len(faraway.far) > 1000 and any(learned)


@needs_cuda
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ("no", "bf16"))
def test_steps_on_cuda_never_wait(monkeypatch, sysu_root, tmp_path, method, precision):
    "Torch itself raises at every wait, from the fourth step of an epoch on."
    config = short(method, sysu_root, tmp_path, "cuda", precision=precision)
    make = type(config).make_method

    def watched_method(self):
        made = make(self)
        steps = made.steps

        def watched(*args):
            try:
                for n, losses in enumerate(steps(*args)):
                    torch.cuda.set_sync_debug_mode("error" if n >= 3 else "default")  # what each of up to three streams prepares may wait
                    yield losses
            finally:
                torch.cuda.set_sync_debug_mode("default")

        made.steps = watched
        return made

    monkeypatch.setattr(type(config), "make_method", watched_method)
    run = train(config)
    assert run.metrics("train")["steps"].iloc[-1] > 3


@needs_cuda
def test_memories_on_cuda_equal_those_on_the_cpu():
    for rule in RULES:
        centers, emb, y = batch()
        near = updated_memory(centers, emb, y, rule=rule, generator=seeded_torch(1))
        torch.cuda.set_sync_debug_mode("error")
        try:
            far = updated_memory(on_device(centers, "cuda"), on_device(emb, "cuda"), y, rule=rule, generator=seeded_torch(1))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(near, far.cpu(), atol=2e-6, rtol=0)


# ---------------------------------------------------------------------------------------------- what waits no longer is still refused


def bad_from(step, value):
    "Losses pass through; this step's is spoilt."
    def spoil(loss):
        spoil.n += 1
        return loss * value if spoil.n == step else loss

    spoil.n = 0
    return spoil


@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("optimizer", ("adam", "sgd"))
@pytest.mark.parametrize("step", (1, 3))
def test_a_bad_loss_never_reaches_weights_moments_or_checkpoint(fused, optimizer, step):
    engine = Engine(EngineConfig(device="cpu", fused=fused))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    made = torch.optim.Adam(net.parameters(), lr=0.1) if optimizer == "adam" else torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    net, made = engine.prepare(net, made)
    spoil, seen, x = bad_from(step, float("nan")), [[p.detach().clone() for p in net.parameters()]], torch.randn(5, 4, generator=seeded_torch(0))

    def steps():
        for _ in range(5):
            loss = spoil(net(x).square().mean())
            engine.step(loss, made)
            seen.append([p.detach().clone() for p in net.parameters()])
            yield {"loss": loss}

    read = []
    with pytest.raises(VireidError, match="became nan"):
        for values in engine.read(steps()):
            read.append(values["loss"])
    assert len(read) == step - 1 and np.isfinite(read).all()
    assert len(seen) == (1 + step - 1 if not fused else 1 + step + 1)  # told at once, or while the next step is under way
    for before, after in zip(seen, seen[1:step]):
        assert not all(torch.equal(a, b) for a, b in zip(before, after))
    for after in seen[step:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[step - 1], after))


@pytest.mark.parametrize("fused", (False, True))
def test_training_stops_at_a_bad_loss_and_keeps_its_checkpoint(monkeypatch, sysu_root, tmp_path, fused):
    config = replace(short("baseline", sysu_root, tmp_path, fused=fused), joint_epochs=2)
    nce, calls, epochs = training.Learner.embed, [], []

    def diverging(self, given, *args):
        emb = nce(self, given, *args)
        calls.append(1)
        return type(emb)(*(e * float("nan") for e in emb)) if len(epochs) == 2 else emb

    monkeypatch.setattr(training.Learner, "embed", diverging)
    monkeypatch.setattr("vireid_nb.memories.at_hand", lambda x: False)  # as on a GPU, where only the loss can tell
    told = lambda run, entry: epochs.append(entry["epoch"]) if entry["event"] == "train" else None
    with pytest.raises(VireidError, match="the training loss became nan"):
        train(config, callbacks=(told,))
    engine = Engine(config.engine)
    held, _ = training.load_model(training.Run(tmp_path / "baseline"))
    assert all(torch.isfinite(v).all() for v in held.state_dict().values() if v.is_floating_point())
    assert load_checkpoint(tmp_path / "baseline/checkpoints/last", held)["epoch"] == 2 and engine.late == fused


def test_late_numbers_are_the_same_numbers(sysu_root, tmp_path):
    "With the fused optimiser on a CPU: every step is told once, in order, and a resumed run goes on as it would have."
    told = []
    config = short("baseline", sysu_root, tmp_path, fused=True)
    run = train(config, callbacks=(lambda run, entry: told.append(entry),))
    steps = [e for e in told if e["event"] == "step"]
    assert [e["step"] for e in steps] == [n for epoch in (0, 1) for n in range(sum(e["epoch"] == epoch for e in steps))]
    for e in (e for e in told if e["event"] == "train"):
        own = [s["loss"] for s in steps if s["epoch"] == e["epoch"]]
        for name, mean in e["loss"].items():
            assert mean == float(np.mean([v[name] for v in own if name in v]))
    assert len(steps) == run.metrics("train")["steps"].iloc[-1]
    again = train(replace(config, name="again"))
    assert numbers(run) == numbers(again)


# ---------------------------------------------------------------------------------------------- options of the step


@pytest.mark.parametrize("fused", (False, True))
def test_a_checkpoint_goes_back_in_any_layout(tmp_path, fused):
    "Channels-last weights and the fused optimiser: the same bits after a resume as without one."
    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1), torch.nn.Flatten()).to(memory_format=torch.channels_last)
        engine = Engine(EngineConfig(device="cpu", fused=fused))
        return engine, *engine.prepare(net, torch.optim.Adam(net.parameters(), lr=0.01))

    x = torch.randn(2, 3, 6, 6, generator=seeded_torch(0)).contiguous(memory_format=torch.channels_last)
    step = lambda engine, net, optimizer: engine.step(net(x).square().mean(), optimizer)
    straight, cut, resumed = make(), make(), make()
    for _ in range(4):
        step(*straight)
    step(*cut), step(*cut)
    save_checkpoint(tmp_path / "last", cut[1], cut[2], {})
    load_checkpoint(tmp_path / "last", resumed[1], resumed[2])
    step(*resumed), step(*resumed)
    for a, b in zip(straight[1].parameters(), resumed[1].parameters()):
        assert torch.equal(a, b) and a.stride() == b.stride() == resumed[2].state[b]["exp_avg"].stride()
    assert all(g["fused"] is (True if fused else None) for g in resumed[2].param_groups)


def test_bf16_on_a_cpu_only_when_asked_for():
    assert Engine(EngineConfig(device="cpu")).precision == "no"
    engine = Engine(EngineConfig(device="cpu", precision="bf16"))
    with engine.autocast():
        assert torch.nn.Linear(4, 2)(torch.ones(1, 4)).dtype == engine.dtype == torch.bfloat16


class Toy(torch.nn.Module):
    "A network with a shared part."

    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(4, 2)

    def body(self, x):
        return torch.relu(self.lin(x)).square() + 1

    def forward(self, x):
        return self.body(x)


def test_compile_keeps_numbers_and_names_or_says_why_not(monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Toy()
    seen = []

    def compiled(f):  # stands in for a minute of compiling
        seen.append(f)
        return lambda *args: f(*args)

    monkeypatch.setattr(torch, "compile", compiled)
    net, _ = Engine(EngineConfig(device="cpu", compile=True)).prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    assert len(seen) == 2 and seen[1].__func__ is Toy.body and list(net.state_dict()) == ["lin.weight", "lin.bias"]
    assert net(torch.ones(1, 4)).shape == (1, 2)

    def broken(f):
        raise RuntimeError("no C++ compiler found\nat all")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(VireidError, match="engine.compile: .*no C.. compiler found.*or leave it out"):
        Engine(EngineConfig(device="cpu", compile=True)).prepare(Toy(), torch.optim.SGD(plain.parameters(), lr=0.1))


@needs_cuda
def test_cuda_takes_the_fast_way_by_itself():
    engine = Engine(EngineConfig())
    net = torch.nn.Conv2d(3, 8, 3)
    net, optimizer = engine.prepare(net, torch.optim.Adam(net.parameters()))
    assert engine.fused and engine.late and net.weight.is_contiguous(memory_format=torch.channels_last)
    engine.step(net(torch.ones(2, 3, 8, 8, device=engine.device)).sum(), optimizer)
    assert all(g["fused"] for g in optimizer.param_groups)
