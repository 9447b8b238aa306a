"""D14 knows no attack: it reads whatever rows give away, and no more than chance weights do."""

import copy

import pytest
import torch
from torch import Tensor, nn

from leakatlas import models
from leakatlas.blocks import readout
from leakatlas.data import bundled
from leakatlas.fl import edits
from leakatlas.lint import inversion, lint
from leakatlas.lint.behaviour import Batch, batch_gradient

SIZE = 8
IMAGES = bundled.patches(SIZE, 16)
BATCH = Batch(IMAGES.images.double(), IMAGES.labels)
PIXELS = 3 * SIZE * SIZE


def behind(block: edits.Edit) -> nn.Module:
    return edits.Imprinted(block.layers(), models.build("convnet", size=SIZE, width=4)).double()


def edges(bins: int = 64) -> Tensor:
    return readout.bin_edges(
        "empirical", bins, values=brightness(bundled.patches(SIZE, 256).images)
    )


def brightness(images: Tensor) -> Tensor:
    return images.flatten(1).mean(dim=1)


def leak_of(model: nn.Module, place: str, batch: Batch = BATCH) -> inversion.Leak:
    leaks = inversion.self_inversion(model, batch, batch_gradient(model, batch))
    return next(leak for leak in leaks if leak.place == place)


@pytest.mark.parametrize("form", ["cumulative", "sparse"])
def test_every_example_alone_in_its_bin_is_found(form: edits.Form) -> None:
    cuts = edges()
    block = edits.Imprint(torch.full((PIXELS,), 1 / PIXELS), cuts, form=form)
    leak = leak_of(behind(block), "block.first")
    bins = torch.bucketize(brightness(BATCH.x), cuts)
    alone = torch.tensor([int((bins == b).sum()) == 1 for b in bins])
    assert 0 < int(alone.sum()) < len(alone)
    assert bool(leak.found[alone].all())
    assert leak.pixels


def test_rows_in_any_order_give_the_same() -> None:
    model = behind(edits.Imprint(torch.full((PIXELS,), 1 / PIXELS), edges()))
    before = leak_of(model, "block.first")
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, dim in (("block.first.weight", 0), ("block.first.bias", 0),
                          ("block.second.weight", 1)):  # fmt: skip
            named[name].copy_(named[name].index_select(dim, order))
    assert torch.equal(leak_of(model, "block.first").found, before.found)


def test_columns_of_one_client_and_rows_without_bias_are_read_up_to_a_factor() -> None:
    block = edits.SplitImprint(
        torch.full((PIXELS,), 1 / PIXELS), edges(), shape=(3, SIZE, SIZE), clients=3, group=1,
        kappa=5.0,
    )  # fmt: skip
    model = behind(block)
    gradient = batch_gradient(model, BATCH)
    full = inversion.self_inversion(model, BATCH, gradient)[0]
    del gradient["block.first.bias"]
    scaled = inversion.self_inversion(model, BATCH, gradient)[0]
    assert scaled.how == "rows scaled"
    assert full.share > 0.5 and scaled.share > 0.5


def test_class_decoupling_is_read_by_differences_of_two_rows() -> None:
    """Equal logits: only the row of an absent class, subtracted, shows an example."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 12), nn.ReLU(), nn.Linear(12, 12))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.fill_(1 / PIXELS if name == "1.weight" else 0.0)
        model.get_parameter("3.weight").copy_(torch.eye(12))
    model.double()
    batch = Batch(BATCH.x[:8], torch.arange(8))
    leak = leak_of(model, "1", batch)
    assert leak.share == 1 and leak.how == "differences of two rows"


def test_a_lone_active_example_is_found_in_the_head() -> None:
    """Fishing isolates a feature, not an image: the head's own inputs are what is compared."""
    model = models.build("convnet", size=SIZE, width=4).double()
    with torch.no_grad():
        weight, bias = model.get_parameter("fc.weight"), model.get_parameter("fc.bias")
        weight.zero_()
        weight[3] = 0.5
        bias.fill_(1000.0)
        bias[3] = 0.0
    batch = Batch(BATCH.x, torch.where(torch.arange(16) == 5, 3, 7))
    leak = leak_of(model, "fc", batch)
    assert bool(leak.found[5]) and not leak.pixels


def test_convolutional_models_give_nothing_away() -> None:
    for name in ("lenet", "convnet", "resnet8", "vit"):
        model = models.build(name, size=SIZE).double()
        scores, _, _ = inversion.d14_self_inversion(
            model, BATCH, batch_gradient(model, BATCH), head="fc"
        )
        assert all(s.value == 0 for s in scores if s.statistic == "D14/hidden")


def test_what_chance_weights_give_away_does_not_count() -> None:
    """A wide honest layer leaks most of a small batch: what it shows beyond that is too little."""
    model = models.build("fc", size=SIZE, widths=(256,), seed=1).double()
    batch = Batch(BATCH.x[:3], BATCH.y[:3])
    scores, leaks, unjudged = inversion.d14_self_inversion(
        model, batch, batch_gradient(model, batch), head="fc"
    )
    assert max(leak.share for leak in leaks if leak.pixels) == 1
    assert scores == []
    assert "too few examples" in unjudged


@pytest.mark.parametrize("count", [4, 10, 16])
def test_small_honest_networks_are_not_taken_for_tampered_with(count: int) -> None:
    """Their features are much alike before training, and read off the update by chance."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = models.build("lenet5", act="relu", classes=10)
        chosen = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:count]
        batch = bundled.patches(32, 64).images[chosen], torch.arange(count) % 10
        verdict = lint(model, batch=batch)
        assert not verdict.alarm, f"seed {seed}: {verdict}"


def test_noise_on_the_update_hides_what_it_held() -> None:
    model = behind(edits.Imprint(torch.full((PIXELS,), 1 / PIXELS), edges()))
    gradient = batch_gradient(model, BATCH)
    generator = torch.Generator().manual_seed(0)
    noisy = {
        n: g + g.abs().max() * torch.randn(g.shape, generator=generator, dtype=g.dtype)
        for n, g in gradient.items()
    }
    assert leak_of(model, "block.first").share > 0.5
    assert inversion.self_inversion(model, BATCH, noisy)[0].share < 0.2


def test_one_example_is_not_judged() -> None:
    model = models.build("fc", size=SIZE).double()
    batch = Batch(BATCH.x[:1], BATCH.y[:1])
    scores, leaks, unjudged = inversion.d14_self_inversion(
        model, batch, batch_gradient(model, batch), head="fc"
    )
    assert scores == []
    assert "one example alone" in unjudged
    assert leaks[0].pixels and leaks[0].share == 1, "whoever wants to know, is told"


def test_a_twin_has_other_weights_the_same_for_everyone() -> None:
    model = models.build("convnet-bn", size=SIZE, width=4)
    before = copy.deepcopy(model.state_dict())
    a, b, c = inversion.twin(model, 0), inversion.twin(model, 0), inversion.twin(model, 1)
    assert torch.equal(a.get_parameter("fc.weight"), b.get_parameter("fc.weight"))
    assert not torch.equal(a.get_parameter("fc.weight"), c.get_parameter("fc.weight"))
    limit = a.get_parameter("fc.weight").shape[1] ** -0.5
    assert 0.9 * limit < float(a.get_parameter("fc.weight").detach().abs().max()) <= limit
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_inputs_of_layers_leave_the_model_alone() -> None:
    model = models.build("convnet-bn", size=SIZE, width=4)
    before = copy.deepcopy(model.state_dict())
    found = inversion.layer_inputs(model, BATCH.x.float())
    assert set(found) == {"fc"} and len(found["fc"]) == 16
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and not model.get_submodule("fc")._forward_hooks


def test_match_asks_for_the_length_and_match_directions_does_not() -> None:
    x = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    assert inversion.match(x[:1], x).tolist() == [True, False, False]
    assert inversion.match(2 * x[:1], x).tolist() == [False] * 3
    assert inversion.match_directions(-2 * x[:1], x).tolist() == [True, False, False]
    assert inversion.match(torch.full((1, 3), torch.nan), x).tolist() == [False] * 3
    assert inversion.match(x[:0], x).tolist() == [False] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_matched_too(dtype: torch.dtype) -> None:
    x = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert inversion.match(x[:2], x).tolist() == [True, True, False]
