"""mixup and CutMix against closed forms and NumPy; every method with mixed labels."""

import math

import numpy as np
import pytest
import torch

from litdistill.config.build import build_data
from litdistill.config.recipes import teacher_config
from litdistill.data import mixing
from litdistill.data.augment import Crop, Flip, apply_views, draw_views
from litdistill.data.datamodule import ImageData
from litdistill.data.loading import Rows
from litdistill.data.mixing import LEVELS, CutMix, Mixup
from litdistill.training.train import train
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF
from tests.conftest import compose_config

# Distribution functions of Beta(alpha, alpha) as textbooks give them.
CDF = {
    0.5: lambda x: 2 / math.pi * np.arcsin(np.sqrt(x)),
    1.0: lambda x: x,
    2.0: lambda x: 3 * x**2 - 2 * x**3,
    3.0: lambda x: 10 * x**3 - 15 * x**4 + 6 * x**5,
}


def every_share(alpha: float, probability: float = 1.0) -> np.ndarray:
    """The shares of all values that the bits can have."""
    nothing = torch.zeros(LEVELS, 1, 1, 1, dtype=torch.uint8)
    return Mixup(alpha, probability).apply(nothing, nothing, torch.arange(LEVELS))[1].double().numpy()


@pytest.mark.parametrize("alpha", CDF)
def test_shares_are_beta_distributed(alpha):
    shares = np.sort(every_share(alpha))
    steps = (np.arange(LEVELS) + 0.5) / LEVELS
    assert np.abs(CDF[alpha](shares) - steps).max() < 1e-4  # float32 shares, where the function is steepest


def test_shares_have_the_moments_of_a_small_alpha():
    shares, alpha = every_share(0.2), 0.2
    assert abs(shares.mean() - 0.5) < 1e-6
    assert abs(shares.var() - 1 / (4 * (2 * alpha + 1))) < 1e-5
    drawn = np.random.default_rng(0).beta(alpha, alpha, 400_000)
    quantiles = np.linspace(0.01, 0.99, 25)
    assert np.abs(np.quantile(shares, quantiles) - np.quantile(drawn, quantiles)).max() < 0.02


def test_probability_leaves_the_rest_as_they_are():
    shares = every_share(1.0, 0.25)
    assert abs((shares == 1).mean() - 0.75) < 1e-4
    assert abs(shares[shares < 1].mean() - 0.5) < 1e-3


def data(mix, **options) -> ImageData:
    found = ImageData("digits", augment=[Crop(1), Flip()], mix=mix, **options)
    found.setup()
    return found


@pytest.mark.parametrize("kind", [Mixup(1.0), CutMix(1.0)])
def test_images_and_labels_are_mixed_as_numpy_mixes_them(kind):
    d = data(kind, seed=3)
    ids, rounds = d.train_ids[100:160], torch.full((60,), 7)
    batch = d.get_batch("train", ids, rounds)
    partners = mixing.partners(3, rounds, ids, d.train_ids)
    own, others = (  # each in the view that it has itself in this round
        apply_views(d.augment, d.source.train.images[i], draw_views(d.augment, 3, rounds, i)).double().numpy()
        for i in (ids, partners)
    )
    targets = batch.targets.double().numpy()
    labels, other_labels = (d.train_targets[i].numpy() for i in (ids, partners))
    partial = 0
    for n in range(60):
        image = batch.inputs[n].double().numpy() * (255 if batch.inputs.is_floating_point() else 1)
        share = targets[n, labels[n]]
        if labels[n] != other_labels[n]:
            assert targets[n].sum() == pytest.approx(1, abs=1e-6)
            assert targets[n, other_labels[n]] == pytest.approx(1 - share, abs=1e-6)
        else:
            assert share == pytest.approx(1, abs=1e-6)
            continue
        if isinstance(kind, Mixup):
            assert np.abs(image - (share * own[n] + (1 - share) * others[n])).max() < 1e-3
            partial += 0.01 < share < 0.99
        else:
            taken = np.zeros((8, 8), bool)
            rest = (image != own[n])[0]
            assert (image[0][rest] == others[n][0][rest]).all()
            count = round((1 - share) * 64)  # the label's share is that of the pixels
            rows, cols = np.nonzero(rest)
            if len(rows):
                taken[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1] = True
                assert taken.sum() <= count
            assert 64 * (1 - share) == pytest.approx(count, abs=1e-4)
            partial += 0 < count < 64
    assert partial > 20


def test_the_box_of_cutmix_is_the_published_one():
    """`rand_bbox` of the authors' code, for every centre and many shares."""
    cut, (h, w) = CutMix(1.0), (9, 14)
    bits = torch.randint(0, 2**56, (3000,), generator=torch.Generator().manual_seed(0))
    black, white = torch.zeros(3000, 1, h, w, dtype=torch.uint8), torch.ones(3000, 1, h, w, dtype=torch.uint8)
    mixed, share = cut.apply(black, white, bits)
    centers = set()
    for n, b in enumerate(bits.tolist()):
        lam = (b % 2**16 + 0.5) / 2**16
        cy, cx = ((b >> 16) % 2**20) * h >> 20, ((b >> 36) % 2**20) * w >> 20
        cut_h, cut_w = int(h * np.sqrt(1 - lam)), int(w * np.sqrt(1 - lam))
        expected = np.zeros((h, w))
        expected[max(cy - cut_h // 2, 0) : cy + cut_h // 2, max(cx - cut_w // 2, 0) : cx + cut_w // 2] = 1
        assert (mixed[n, 0].numpy() == expected).all()
        assert share[n] == pytest.approx(1 - expected.mean(), abs=1e-6)
        centers.add((cy, cx))
    assert len(centers) == h * w


@pytest.mark.parametrize("kind", [Mixup(0.4), CutMix(1.0)])
def test_a_mixed_image_depends_on_no_batch(kind):
    d = data(kind, batch_size=50)
    ids, rounds = d.train_ids[:90], torch.arange(90) % 4
    whole = d.get_batch("train", ids, rounds)
    parts = [d.get_batch("train", i, r) for i, r in zip(ids.split(7), rounds.split(7), strict=True)]
    assert torch.equal(whole.inputs, torch.cat([p.inputs for p in parts]))
    assert torch.equal(whole.targets, torch.cat([p.targets for p in parts]))
    assert not torch.equal(whole.inputs, data(kind, seed=1).get_batch("train", ids, rounds).inputs)
    assert not torch.equal(whole.inputs, d.get_batch("train", ids, rounds + 1).inputs)
    first = next(iter(d.train_dataloader()))  # a view is its round
    assert first.views.tolist() == [0] * 50
    assert d.views is None
    assert data(None).views == 18


def test_partners_are_trained_on_and_evenly_drawn():
    d = data(Mixup(), per_class=20)
    ids = d.train_ids.repeat(500)
    partners = mixing.partners(0, torch.arange(500).repeat_interleave(200), ids, d.train_ids)
    counts = torch.bincount(partners, minlength=len(d.train_targets)).double()
    assert counts[d.train_ids].sum() == len(ids)
    assert ((counts[d.train_ids] - 500) ** 2 / 500).sum() < 290  # 199 degrees of freedom
    assert (partners == ids).double().mean() < 0.008  # itself once in 200


def test_evaluation_is_never_mixed():
    d = data(Mixup())
    assert d.make_batch(Rows("train", d.val_ids[:5])).targets.ndim == 1
    assert torch.equal(
        d.make_batch(Rows("train", d.val_ids[:5])).inputs, data(None).make_batch(Rows("train", d.val_ids[:5])).inputs
    )


@pytest.mark.parametrize("options", [{"alpha": 0}, {"alpha": -1}, {"probability": 0}, {"probability": 1.5}])
@pytest.mark.parametrize("kind", [Mixup, CutMix])
def test_impossible_options_are_refused(kind, options):
    with pytest.raises(UserError, match=r"data\.mix"):
        kind(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", sorted(p.stem for p in (CONF / "method").glob("*.yaml") if "litdistill.tasks." not in p.read_text())
)
def test_every_method_trains_on_mixed_labels(method, small):
    """None reads a label that is no index: DKD takes the class with the largest share, the others only ids."""
    mix = "data.mix={_target_: litdistill.data.mixing.CutMix}"
    cfg = small(f"method={method}", mix, "+teacher.recipe.data.mix=null", "trainer.max_epochs=1", "logger=none")
    assert train(cfg) > 0


def test_a_config_names_them(tmp_path):
    augment = "data.augment=[{_target_: litdistill.data.randaugment.RandAugment, ops: 1}]"
    cfg = compose_config(
        tmp_path / "run", augment, "data.mix={_target_: litdistill.data.mixing.CutMix, probability: 0.5}"
    )
    found, _ = build_data(cfg)
    assert isinstance(found.mix, CutMix)
    assert [type(step).__name__ for step in found.augment] == ["RandAugment"]
    batch = found.make_batch(next(iter(found.train_dataloader())))
    assert batch.targets.shape == (cfg.data.batch_size, 10)
    assert 0.2 < (batch.targets.max(1).values == 1).float().mean() < 0.95


def test_the_patient_teacher_is_asked_of_mixed_views_and_the_labels_count_for_nothing(tmp_path):
    """Beyer et al. 2022: the view that the student sees, mixed without limit; a teacher of its own learns without mixing."""
    cfg = compose_config(tmp_path / "run", "experiment=schemes/patient")
    mix = build_data(cfg)[0].mix
    assert isinstance(mix, Mixup)
    assert (mix.alpha, mix.probability) == (1.0, 1.0)
    assert torch.quantile(mix.shares, 0.25).item() == pytest.approx(0.25, abs=1e-3)  # uniform
    assert (cfg.method.hard, cfg.method.soft, cfg.method.temperature) == (0.0, 1.0, 1.0)
    assert cfg.data.fixed_views is None
    assert cfg.scheduler._target_.endswith("warmup_cosine")
    recipe = teacher_config(cfg)
    assert recipe.data.mix is None
    assert recipe.trainer.max_epochs < cfg.trainer.max_epochs
