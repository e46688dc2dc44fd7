"Extraction and feature files."

import numpy as np
import pytest
import torch

from vireid_nb.backbone import BackboneConfig, build_backbone
from vireid_nb.features import evaluating, extract, load_bank, load_extra, save_bank
from vireid_nb.records import FeatureBank, VireidError


@pytest.fixture(scope="module")
def model():
    return build_backbone(BackboneConfig("tiny", weights="none"))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    store = torch.from_numpy(rng.integers(0, 256, (23, 3, 96, 48), dtype=np.uint8))
    return store, rng.integers(0, 2, 23), rng.integers(0, 4, 23)


@pytest.mark.parametrize("batch_size", [1, 4, 23, 64])
@pytest.mark.parametrize("pooled", [False, True])
def test_independent_of_batch_size_and_order(model, data, batch_size, pooled):
    store, modality, camid = data
    want = extract(model, store, modality, camid, pooled=pooled, progress=False)
    order = np.random.default_rng(1).permutation(23)
    got = extract(model, store, modality, camid, index=order, batch_size=batch_size, pooled=pooled, progress=False)
    assert (got.index == order).all() and (got.modality == modality[order]).all() and (got.camid == camid[order]).all()
    assert abs(got.features - want.features[order]).max() < 1e-5
    assert np.allclose(np.linalg.norm(got.features, axis=1), 1, atol=1e-6)


def test_deterministic_and_nothing_moved(model, data):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    one, two = (extract(model, *data, progress=False) for _ in range(2))
    assert (one.features == two.features).all()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes


def test_mirror(model, data):
    store, modality, camid = data
    both = extract(model, store, modality, camid, progress=False)
    mirrored = extract(model, store.flip(3), modality, camid, progress=False)
    assert abs(both.features - mirrored.features).max() < 1e-5
    single = [extract(model, s, modality, camid, flip=False, progress=False).features for s in (store, store.flip(3))]
    assert abs(single[0] - single[1]).max() > 1e-3
    mean = sum(single)
    assert np.allclose(both.features, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)


def test_modes_return_even_after_an_error(model):
    model.layer2.eval()
    with pytest.raises(KeyError):
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            raise KeyError
    assert model.training and model.layer1.training and not model.layer2.training
    model.train()


def test_mixed_precision_is_close(model, data):
    want = extract(model, *data, progress=False)
    got = extract(model, *data, precision=torch.bfloat16, progress=False)
    assert got.features.dtype == np.float32
    assert 0 < abs(got.features - want.features).max() < 0.1


class BrokenStore:
    def __len__(self):
        return 8

    def __getitem__(self, rows):
        if 5 in rows:
            raise VireidError("image 5 is broken; run vireid check")
        return torch.zeros(len(rows), 3, 96, 48, dtype=torch.uint8)


def test_a_broken_image_surfaces(model):
    with pytest.raises(VireidError, match="image 5"):
        extract(model, BrokenStore(), [0] * 8, [0] * 8, batch_size=2, progress=False)
    assert model.training


def test_a_dead_network_is_refused(data):
    dead = build_backbone(BackboneConfig("tiny", weights="none"))
    dead.neck.weight.data.zero_()
    with pytest.raises(VireidError, match="NaN"):
        extract(dead, *data, progress=False)


@pytest.mark.parametrize("half", [False, True])
def test_bank_roundtrip(tmp_path, half):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 16)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    bank = FeatureBank(features, rng.integers(0, 2, 50), rng.integers(-1, 4, 50), rng.permutation(50))
    save_bank(tmp_path / "b.safetensors", bank.take(slice(None, None, 2)), {"paths": ["ä.jpg"]}, half=half)  # a strided view
    got = load_bank(tmp_path / "b.safetensors")
    assert got.features.dtype == np.float32 and load_extra(tmp_path / "b.safetensors") == {"paths": ["ä.jpg"]}
    for k in ("modality", "camid", "index"):
        assert (getattr(got, k) == getattr(bank, k)[::2]).all()
    assert abs(got.features - features[::2]).max() <= (1e-3 if half else 0)
    assert np.allclose(np.linalg.norm(got.features, axis=1), 1, atol=1e-6)


def test_broken_bank(tmp_path):
    bank = FeatureBank(np.eye(3), [0, 1, 0], [0, 0, 0], [0, 1, 2])
    save_bank(tmp_path / "b.safetensors", bank)
    whole = (tmp_path / "b.safetensors").read_bytes()
    for n in (0, 5, 60, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:n])
        with pytest.raises(VireidError, match="cannot be read"):
            load_bank(tmp_path / "cut.safetensors")
    with pytest.raises(VireidError, match="no feature file"):
        load_bank(tmp_path / "gone.safetensors")
