"The network contract, over all backbones, and the weights files."

import copy

import pytest
import torch
import torch.nn as nn
import torchvision

from vireid_nb import backbone
from vireid_nb.backbone import BackboneConfig, NonLocal, build_backbone, gem, load_weights, read_weights, save_weights
from vireid_nb.records import Modality, VireidError

SIZES = {"resnet50": (64, 32), "resnet18": (64, 32), "tiny": (96, 48)}
DIMS = {"resnet50": 2048, "resnet18": 512, "tiny": 128}


def fresh(name, **options):
    return build_backbone(BackboneConfig(name, weights="none", **options))


def crops(name, n, seed=0):
    return torch.randn(n, 3, *SIZES[name], generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SIZES)
def test_contract(name):
    model = fresh(name)
    x, modality = crops(name, 4), torch.tensor([1, 0, 1, 0])

    # training: shapes, gradients to both stems and everything else but the frozen bias
    emb, pooled = model(x, modality, return_pooled=True)
    assert model.feat_dim == DIMS[name] and emb.shape == pooled.shape == (4, DIMS[name])
    assert emb.dtype == pooled.dtype == torch.float32
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    (emb * torch.randn(emb.shape, generator=torch.Generator().manual_seed(1))).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == ["neck.bias"]
    assert all(stem.conv1.weight.grad.abs().max() > 0 for stem in model.stems)
    optimizer.step()
    assert not model.neck.bias.any() and not model.neck.bias.requires_grad

    # evaluation: forward is the neck of the pooled features; a mixed batch is its parts; one modality in three ways
    model.eval()
    with torch.inference_mode():
        mixed = model(x, modality)
        assert torch.equal(mixed, model.neck(model.pooled(x, modality)))
        for m in Modality:
            part = model(x[modality == m], m)
            scale = mixed.abs().max()
            assert (mixed[modality == m] - part).abs().max() < 1e-5 * scale
            assert torch.equal(part, model(x[modality == m], int(m)))
            assert torch.equal(part, model(x[modality == m], torch.full((2,), int(m))))
        assert (model(x, Modality.VISIBLE) - model(x, Modality.INFRARED)).abs().max() > 0  # the step drew the stems apart


@pytest.mark.parametrize("name", SIZES)
def test_seeded_and_the_global_state_untouched(name):
    before = torch.random.get_rng_state()
    one, two = fresh(name).state_dict(), fresh(name).state_dict()
    other = build_backbone(BackboneConfig(name, weights="none"), seed=1).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["layer4.0.conv1.weight"], other["layer4.0.conv1.weight"])
    assert torch.equal(one["stems.0.conv1.weight"], one["stems.1.conv1.weight"])  # one start for both modalities


@pytest.mark.parametrize("name, units", [("resnet50", (2, 3)), ("resnet18", (2, 2)), ("tiny", (1, 1))])
def test_non_local_places_and_identity_at_the_start(name, units):
    model = fresh(name, non_local=True)
    assert (len(model.non_local["layer2"]), len(model.non_local["layer3"])) == units
    without = fresh(name, non_local=False)
    shared = {k: v for k, v in model.state_dict().items() if not k.startswith("non_local.")}
    without.load_state_dict(shared)
    x = crops(name, 2)
    assert torch.equal(model.eval()(x, 0), without.eval()(x, 0))
    model.non_local["layer2"][-1].out[1].weight.data.fill_(1.0)
    assert not torch.equal(model(x, 0), without(x, 0))
    assert not fresh("tiny").non_local and fresh("resnet18").non_local


def test_non_local_equals_the_pairwise_matrix():
    block = NonLocal(6, width=2).eval()
    nn.init.uniform_(block.out[1].weight)
    x = torch.randn(3, 6, 5, 4)
    theta, phi, g = (f(x).flatten(2).transpose(1, 2) for f in (block.theta, block.phi, block.g))
    pairs = theta @ phi.transpose(1, 2) / 20
    want = x + block.out((pairs @ g).transpose(1, 2).unflatten(2, (5, 4)))
    assert torch.allclose(block(x), want, atol=1e-6)


def test_gem_is_finite_on_dead_channels():
    maps = torch.zeros(2, 3, 4, 4, requires_grad=True)
    out = gem(maps)
    out.sum().backward()
    assert out.isfinite().all() and maps.grad.isfinite().all()
    assert gem(maps.detach().half() + 1).dtype == torch.float32


@pytest.mark.parametrize("name", ["resnet50", "resnet18"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_weights_give_torchvisions_features(name, suffix, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        plain = getattr(torchvision.models, name)(weights=None).eval()
    path = tmp_path / f"plain{suffix}"
    if suffix == ".pth":
        torch.save(plain.state_dict(), path)
    else:
        save_weights(path, plain)
    model = build_backbone(BackboneConfig(name, weights=str(path), non_local=False, last_stride=2)).eval()
    x = crops(name, 2)
    with torch.inference_mode():
        want = gem(nn.Sequential(*list(plain.children())[:-2])(x))
        for m in Modality:
            assert (model.pooled(x, m) - want).abs().max() < 1e-5 * want.max()


def test_last_stride_doubles_the_map():
    sizes = []
    for stride in (1, 2):
        model = fresh("resnet18", last_stride=stride)
        model.layer4[-1].register_forward_hook(lambda m, i, out: sizes.append(tuple(out.shape[2:])))
        model.eval()(crops("resnet18", 1), 0)
    assert sizes == [(4, 2), (2, 1)]


@pytest.mark.parametrize("name", SIZES)
def test_roundtrip_with_card(name, tmp_path):
    model, card = fresh(name), {"seen": "nothing", "steps": 3, "nested": {"a": [1, 2]}}
    model(crops(name, 4), torch.tensor([0, 1, 0, 1]))  # moves the running statistics
    save_weights(tmp_path / "w.safetensors", model, card)
    other = build_backbone(BackboneConfig(name, weights="none"), seed=9)
    assert load_weights(other, tmp_path / "w.safetensors") == card
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_own_weights_must_fit_whole(tmp_path):
    model = fresh("tiny")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = copy.deepcopy(state)

    def refused(state, message):
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(VireidError, match=message) as e:
            load_weights(model, tmp_path / "w.pth")
        assert "\n" not in str(e.value)

    refused({k: v for k, v in state.items() if k != "neck.weight"}, "1 missing .neck.weight.")
    refused(state | {"classifier.weight": torch.zeros(2)}, "1 unexpected .classifier.weight.")
    refused(state | {"neck.weight": torch.zeros(3)}, r"neck.weight \[3\]")
    refused({}, "missing")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # a refused file changes nothing
    with_blocks = fresh("tiny", non_local=True)
    torch.save(state, tmp_path / "w.pth")
    load_weights(with_blocks, tmp_path / "w.pth")  # blocks may be added, they start as the identity


class Evil:
    def __reduce__(self):
        return (print, ("pickle ran code",))


def test_no_pickle_runs(tmp_path, capsys):
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(VireidError, match="cannot be read"):
        read_weights(tmp_path / "evil.pth")
    assert "pickle ran code" not in capsys.readouterr().out


def test_truncated_file(tmp_path):
    save_weights(tmp_path / "w.safetensors", fresh("tiny"))
    whole = (tmp_path / "w.safetensors").read_bytes()
    for n in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:n])
        with pytest.raises(VireidError, match="cut.safetensors cannot be read"):
            read_weights(tmp_path / "cut.safetensors")


def test_imagenet_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*a, **k):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(VireidError) as e:
        build_backbone(BackboneConfig("resnet50"))
    for part in ("resnet50-0676ba61.pth", str(tmp_path / "checkpoints"), "--model.weights PATH", "none"):
        assert part in str(e.value)


def test_imagenet_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    plain = torchvision.models.resnet18(weights=None)
    torch.save(plain.state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    model = build_backbone(BackboneConfig("resnet18"))
    assert all(torch.equal(stem.conv1.weight, plain.conv1.weight) for stem in model.stems)


def test_tiny_default_missing_from_the_installation(tmp_path, monkeypatch):
    monkeypatch.setattr(backbone.resources, "files", lambda package: tmp_path)
    with pytest.raises(VireidError, match="weights/tiny.safetensors"):
        build_backbone(BackboneConfig("tiny"))


@pytest.mark.parametrize("x, modality, message", [
    (torch.zeros(2, 3, 96, 48), 2, "modalities"),
    (torch.zeros(2, 3, 96, 48), torch.tensor([0, -1]), "modalities"),
    (torch.zeros(2, 3, 96, 48), torch.tensor([0, 1, 0]), "one a row"),
    (torch.zeros(2, 1, 96, 48), 0, "height, width"),
    (torch.zeros(3, 96, 48), 0, "height, width"),
])
def test_wrong_input(x, modality, message):
    with pytest.raises(VireidError, match=message):
        fresh("tiny").eval()(x, modality)


@pytest.mark.parametrize("options", [dict(name="resnet51"), dict(last_stride=3), dict(non_local_width=0), dict(gem_p=0.0)])
def test_wrong_config(options):
    with pytest.raises(VireidError):
        BackboneConfig(**options)
