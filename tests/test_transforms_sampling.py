"""The batched augmentation against one picture at a time, the store under threads, and what every batch of the sampler must satisfy."""
import logging
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vireid_nb.records import VireidError, seeded, seeded_torch
from vireid_nb.sampling import intra_batches, joint_batches, uniform_batches
from vireid_nb.transforms import (
    GRAY,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LUMINANCE,
    UNCHANGED,
    AugmentConfig,
    ImageStore,
    batches_ahead,
    draw,
    exchange,
    infrared_view,
    jitter,
    normalize,
    visible_views,
)


def noise(n, h, w, seed=0):
    return torch.randint(0, 256, (n, 3, h, w), generator=seeded_torch(seed, "noise"), dtype=torch.uint8)


# ---- augmentation


def naive_view(image, top, left, flip, box, config):
    "One picture, in numpy, step by step."
    h, w = image.shape[1:]
    canvas = np.pad(image.numpy(), ((0, 0), (config.pad, config.pad), (config.pad, config.pad)))
    x = canvas[:, top : top + h, left : left + w]
    x = x[:, :, ::-1] if flip else x
    x = (x.astype(np.float32) / np.float32(255) - np.float32(IMAGENET_MEAN)[:, None, None]) / np.float32(IMAGENET_STD)[:, None, None]
    x[:, box[0] : box[1], box[2] : box[3]] = np.float32(config.erase_fill)[:, None, None]
    return x


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 6), h=st.integers(2, 40), w=st.integers(2, 24), pad=st.integers(0, 12), seed=st.integers(0, 99))
def test_jitter_equals_one_picture_at_a_time(n, h, w, pad, seed):
    config = AugmentConfig(pad=pad)
    images, d = noise(n, h, w, seed), draw(n, (h, w), seeded_torch(seed), config)
    got = jitter(images, d, config).numpy()
    for i in range(n):
        want = naive_view(images[i], int(d.top[i]), int(d.left[i]), bool(d.flip[i]), d.box[:, i].tolist(), config)
        np.testing.assert_allclose(got[i], want, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(h=st.integers(2, 300), w=st.integers(2, 200), pad=st.integers(0, 12), seed=st.integers(0, 99))
def test_draws_stay_inside(h, w, pad, seed):
    d = draw(200, (h, w), seeded_torch(seed), AugmentConfig(pad=pad))
    top, bottom, left, right = d.box
    assert d.top.min() >= 0 and d.top.max() <= 2 * pad and d.left.min() >= 0 and d.left.max() <= 2 * pad
    assert (0 <= top).all() and (top <= bottom).all() and (bottom <= h).all()
    assert (0 <= left).all() and (left <= right).all() and (right <= w).all()


def published_box(rng, h, w):
    "Random erasing as published: tries until a rectangle fits."
    for _ in range(100):
        area, aspect = h * w * rng.uniform(0.02, 0.4), rng.uniform(0.3, 3.33)
        tall, wide = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if tall < h and wide < w:
            return tall, wide, rng.integers(0, h - tall, endpoint=True), rng.integers(0, w - wide, endpoint=True)


def test_erased_rectangles_follow_the_published_distribution():
    h, w, rng = 288, 144, seeded(0)
    want = np.array([published_box(rng, h, w) for _ in range(10_000)])
    top, bottom, left, right = draw(20_000, (h, w), seeded_torch(0), AugmentConfig()).box.numpy()
    some = bottom > top
    got = np.stack([bottom - top, right - left, top, left], 1)[some]
    assert abs(some.mean() - 0.5) < 0.02
    for c in range(4):
        quantiles = np.linspace(0.05, 0.95, 10)
        difference = np.abs(np.quantile(got[:, c], quantiles) - np.quantile(want[:, c], quantiles))
        assert difference.max() < 0.03 * (h, w, h, w)[c]


def test_switching_a_step_off_does_not_shift_the_others():
    full = draw(50, (40, 20), seeded_torch(3), AugmentConfig(pad=4))
    bare = draw(50, (40, 20), seeded_torch(3), AugmentConfig(pad=4, erase=0, flip=0))
    assert torch.equal(full.top, bare.top) and torch.equal(full.left, bare.left)
    assert not bare.flip.any() and (bare.box[0] == bare.box[1]).all()


def test_no_augmentation_is_normalisation():
    config = AugmentConfig(pad=0, flip=0, erase=0)
    images = noise(5, 12, 8)
    plain, augmented = visible_views(images, seeded_torch(0), config)
    assert torch.equal(plain, normalize(images))
    assert torch.equal(augmented[:, 0], augmented[:, 1]) and torch.equal(augmented[:, 0], augmented[:, 2])
    assert all(any(torch.equal(a[0], p[c]) for c in range(3)) for a, p in zip(augmented, plain))


@pytest.mark.parametrize("gray", [False, True])
def test_visible_exchange_never_leaves_colour(gray):
    config = AugmentConfig(pad=0, flip=0, erase=0, visible_gray=gray)
    images = torch.tensor([10, 20, 40], dtype=torch.uint8)[None, :, None, None].expand(6000, 3, 1, 1)
    plain, augmented = visible_views(images, seeded_torch(1), config)
    luminance = (plain[0, :, 0, 0] * torch.tensor(LUMINANCE)).sum()
    kinds = [augmented[:, 0, 0, 0] == v for v in plain[0, :, 0, 0]] + [(augmented[:, 0, 0, 0] - luminance).abs() < 1e-6]
    share = torch.stack(kinds).float().mean(1)
    assert torch.allclose(share, torch.tensor([0.25] * 4 if gray else [1 / 3] * 3 + [0]), atol=0.02)


def test_exchange_by_hand():
    x = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1).expand(5, 3, 1, 1)
    out = exchange(x, torch.arange(5))[:, :, 0, 0]
    assert out[:3].tolist() == [[1.0] * 3, [2.0] * 3, [4.0] * 3]
    assert out[UNCHANGED].tolist() == [1.0, 2.0, 4.0]
    assert torch.allclose(out[GRAY], torch.tensor(0.2989 + 2 * 0.5870 + 4 * 0.1140).expand(3))


def test_views_depend_on_the_generator_alone():
    images = noise(8, 20, 10)
    state = torch.get_rng_state()
    one, two, other = (visible_views(images, seeded_torch(s), AugmentConfig(pad=2)) for s in (0, 0, 1))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and not torch.equal(one[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one[0][:, 0], one[1][:, 0])
    assert torch.equal(infrared_view(images, seeded_torch(0)), infrared_view(images, seeded_torch(0)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_views_are_the_same_on_an_accelerator():
    images = noise(16, 40, 20)
    for here, there in zip(visible_views(images, seeded_torch(0)), visible_views(images.cuda(), seeded_torch(0))):
        assert there.is_cuda and torch.allclose(here, there.cpu(), atol=1e-6)


# ---- the store


@pytest.fixture
def pictures(tmp_path):
    rng = seeded(0, "pictures")
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (30 + i, 15 + i, 3), np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path, [f"{i}.png" for i in range(12)]


def naive_store(root, path, size):
    picture = Image.open(root / path).convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("kept", [0, 1, 5, 12, 100])
def test_store_is_the_same_for_every_cache(pictures, kept):
    root, paths = pictures
    store = ImageStore(root, paths, size=(24, 12), cache=kept * 3 * 24 * 12)
    rng = seeded(kept)
    for _ in range(12):
        rows = rng.integers(0, 12, rng.integers(0, 9))
        got = store[rows]
        assert got.dtype == torch.uint8 and got.shape == (len(rows), 3, 24, 12)
        for g, r in zip(got, rows):
            assert torch.equal(g, naive_store(root, paths[r], (24, 12)))
    assert (store._slot >= 0).sum() <= kept
    slots = store._slot[store._slot >= 0]
    assert len(set(slots.tolist())) == len(slots)


def test_store_takes_every_kind_of_row(pictures):
    store = ImageStore(*pictures, size=(24, 12))
    mask = np.arange(12) % 3 == 0
    for rows, want in ((3, [3]), (slice(2, 5), [2, 3, 4]), (mask, [0, 3, 6, 9]), (torch.tensor([1, 1]), [1, 1]), ([-1], [11])):
        assert torch.equal(store[rows], torch.stack([store[i][0] for i in want]))


def test_store_reads_each_picture_once(pictures, monkeypatch):
    import vireid_nb.transforms as transforms

    read, seen = transforms.read_image, []
    monkeypatch.setattr(transforms, "read_image", lambda root, path: seen.append(path) or read(root, path))
    store = ImageStore(*pictures, size=(24, 12))
    for rows in ([0, 0, 1], [1, 2], [2, 1, 0]):
        store[rows]
    assert sorted(seen) == ["0.png", "1.png", "2.png"]


def test_store_under_threads(pictures):
    store = ImageStore(*pictures, size=(24, 12), cache=7 * 3 * 24 * 12)
    want, wrong = torch.stack([naive_store(pictures[0], p, (24, 12)) for p in pictures[1]]), []

    def work(seed):
        rng = seeded(seed, "thread")
        for _ in range(30):
            rows = rng.integers(0, 12, 6)
            if not torch.equal(store[rows], want[rows]):
                wrong.append(rows)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_broken_and_missing_pictures_name_the_file(pictures):
    root, paths = pictures
    (root / "3.png").write_bytes((root / "3.png").read_bytes()[:200])
    store = ImageStore(root, [*paths, "none.png"], size=(24, 12))
    with pytest.raises(VireidError, match=r"3\.png: .*vireid check"):
        store[[2, 3]]
    with pytest.raises(VireidError, match=r"none\.png: no such file"):
        store[12]
    with pytest.raises(VireidError, match=r"3\.png"):
        list(batches_ahead(store, [[0], [3]]))


def test_batches_ahead_keeps_order_and_lets_go(pictures):
    store = ImageStore(*pictures, size=(24, 12))
    rows = [[i, i + 1] for i in range(10)]
    for depth in (1, 2, 20):
        got = list(batches_ahead(store, iter(rows), depth))
        assert [r for r, _ in got] == rows
        assert all(torch.equal(images, store[r]) for r, images in got)
    before = threading.active_count()
    stream = batches_ahead(store, iter(rows))
    next(stream)
    stream.close()
    assert threading.active_count() <= before


# ---- sampling

ragged = st.lists(st.integers(-1, 6), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(labels=ragged, p=st.integers(1, 8), z=st.integers(1, 6), n=st.integers(0, 12), cams=st.booleans(), seed=st.integers(0, 99))
def test_every_batch_is_p_by_z(labels, p, z, n, cams, seed):
    labels = np.array(labels)
    camids = seeded(seed, "cams").integers(-1, 3, len(labels)) if cams else None
    batches = list(intra_batches(labels, camids, n_ids=p, n_instances=z, n_batches=n, generator=seeded(seed)))
    clusters = np.unique(labels[labels >= 0])
    assert len(batches) == (n if len(clusters) else 0)
    dealt = dict.fromkeys(clusters.tolist(), 0)
    for b in batches:
        assert b.dtype == np.int64 and len(b) == min(p, len(clusters)) * z
        ids = labels[b].reshape(-1, z)
        assert (ids == ids[:, :1]).all() and (ids >= 0).all()
        assert len(set(ids[:, 0])) == len(ids)
        for i in ids[:, 0].tolist():
            dealt[i] += 1
    if batches:
        assert max(dealt.values()) - min(dealt.values()) <= 1


@settings(max_examples=60, deadline=None)
@given(labels=ragged, z=st.integers(2, 6), seed=st.integers(0, 99))
def test_partners_come_from_other_cameras_and_repeat_only_in_need(labels, z, seed):
    labels = np.array(labels)
    camids = seeded(seed, "cams").integers(-1, 3, len(labels))
    for b in intra_batches(labels, camids, n_ids=3, n_instances=z, n_batches=4, generator=seeded(seed)):
        for rows in b.reshape(-1, z):
            anchor, rest = rows[0], rows[1:]
            members = np.flatnonzero(labels == labels[anchor])
            others = members[camids[members] != camids[anchor]]
            if camids[anchor] < 0 or not len(others):
                others = members[members != anchor]
            if not len(others):
                assert (rest == anchor).all()
                continue
            assert np.isin(rest, others).all()
            if len(others) >= z - 1:
                assert len(set(rest.tolist())) == z - 1


@pytest.mark.parametrize("draw", ["apart", "paired"])
@settings(max_examples=60, deadline=None)
@given(labels=ragged, p=st.integers(1, 5), z=st.integers(1, 4), seed=st.integers(0, 99))
def test_joint_batches_show_clusters_that_hold_both(draw, labels, p, z, seed):
    labels = np.array(labels)
    modality = seeded(seed, "modality").integers(0, 2, len(labels))
    both = set(labels[(modality == 0) & (labels >= 0)].tolist()) & set(labels[(modality == 1) & (labels >= 0)].tolist())
    batches = list(joint_batches(labels, modality, None, n_ids=p, n_instances=z, n_batches=5, generator=seeded(seed), draw=draw))
    assert len(batches) == (5 if both else 0)
    for visible, infrared in batches:
        assert len(visible) == len(infrared) == min(p, len(both)) * z
        assert (modality[visible] == 0).all() and (modality[infrared] == 1).all()
        assert set(labels[visible].tolist()) | set(labels[infrared].tolist()) <= both
        assert draw == "apart" or (labels[visible] == labels[infrared]).all()


def test_halves_drawn_apart_have_random_numbers_of_their_own():
    "What one modality holds does not change what is drawn from the other, as long as the same clusters hold both."
    labels, modality = np.repeat(np.arange(12), 10), np.tile([0] * 5 + [1] * 5, 12)
    kind = dict(n_ids=4, n_instances=3, n_batches=20, generator=None)
    draw = lambda y: list(joint_batches(y, modality, None, **kind | {"generator": seeded(0)}))
    fewer = np.where((np.arange(120) % 10 == 9) & (labels < 5), -1, labels)  # an infrared picture less in some clusters
    one, two = draw(labels), draw(fewer)
    assert np.array_equal([v for v, _ in one], [v for v, _ in two]) and not np.array_equal([r for _, r in one], [r for _, r in two])


@settings(max_examples=40, deadline=None)
@given(labels=ragged, p=st.integers(1, 5), z=st.integers(1, 4), seed=st.integers(0, 99))
def test_uniform_batches_leave_out_clusters_with_too_few(labels, p, z, seed):
    labels = np.array(labels)
    modality = seeded(seed, "modality").integers(0, 2, len(labels))
    count = lambda m: np.bincount(labels[(modality == m) & (labels >= 0)], minlength=labels.max(initial=0) + 1)
    enough = set(np.flatnonzero((count(0) >= z) & (count(1) >= z)).tolist())
    batches = list(uniform_batches(labels, modality, n_ids=p, n_instances=z, n_batches=5, generator=seeded(seed)))
    assert len(batches) == (5 if enough else 0)
    for visible, infrared in batches:
        assert (modality[visible] == 0).all() and (modality[infrared] == 1).all() and len(visible) == min(p, len(enough)) * z
        assert (labels[visible] == labels[infrared]).all() and set(labels[visible].tolist()) <= enough


def test_tensors_and_arrays_give_the_same_batches():
    labels, camids = seeded(0).integers(-1, 9, 200), seeded(1).integers(0, 4, 200)
    kind = dict(n_ids=4, n_instances=4, n_batches=3)
    one = list(intra_batches(labels, camids, **kind, generator=seeded(2)))
    two = list(intra_batches(torch.from_numpy(labels), torch.from_numpy(camids), **kind, generator=seeded(2)))
    assert np.array_equal(one, two)


def test_few_clusters_are_said_once_and_none_too(caplog):
    with caplog.at_level(logging.WARNING, "vireid_nb"):
        list(intra_batches([0, 0, 1], None, n_ids=4, n_instances=2, n_batches=9, generator=seeded(0)))
        assert [r.getMessage() for r in caplog.records] == ["intra-modality sampling: 2 clusters for batches of 4 identities; each batch holds all of them"]
        caplog.clear()
        assert list(intra_batches([-1, -1], None, n_ids=4, n_instances=2, n_batches=9, generator=seeded(0))) == []
        assert len(caplog.records) == 1 and "no batch can be drawn" in caplog.text


@pytest.mark.parametrize("bad", [dict(n_ids=0), dict(n_instances=0), dict(camids=[0])])
def test_impossible_batches_are_refused(bad):
    kind = dict(n_ids=2, n_instances=2, camids=None) | bad
    camids = kind.pop("camids")
    with pytest.raises(VireidError):
        intra_batches([0, 1], camids, **kind, n_batches=1, generator=seeded(0))
