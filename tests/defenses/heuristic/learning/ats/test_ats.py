from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from leakatlas import models
from leakatlas.data import ImageSet, bundled
from leakatlas.defenses.heuristic.learning import ats
from leakatlas.defenses.heuristic.learning.ats import ATS, _operations, _search
from leakatlas.errors import InvalidInput, InvalidParameter, Unavailable
from leakatlas.fl import FedAVG
from leakatlas.threat import Grant
from tests.conftest import BOX, build_stage, relative_error
from tests.defenses.heuristic.probes import first_layer_readout, observed, replayed

SECRETS = frozenset({Grant.LABELS, Grant.DEFENSE_SECRETS})


def _photo(size: int = 32) -> Tensor:
    """On the 8-bit lattice, on which Pillow works."""
    image = bundled.photos(size).images[0]
    return (image * 255).round() / 255


def _pillow(image: Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def test_the_library_has_fifty_entries_and_the_published_hybrids_mean_what_they_did() -> None:
    assert len(_operations.LIBRARY) == 50
    assert {name for name, _ in _operations.LIBRARY} <= set(_operations.OPERATIONS)
    named = [[_operations.LIBRARY[i] for i in policy] for policy in ((3, 1, 7), (43, 18, 18))]
    assert named == [
        [("translateX", 9), ("contrast", 6), ("translateY", 2)],
        [("translateY", 3), ("contrast", 7), ("contrast", 7)],
    ]


ENHANCED = {
    "color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness, "sharpness": ImageEnhance.Sharpness,
}  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [0, 3, 9])
@pytest.mark.parametrize("name", ENHANCED)
def test_enhancements_are_pillows(name: str, magnitude: int, sign: int) -> None:
    image = _photo()
    factor = 1 + 0.5 * magnitude / 9 * sign
    found = _operations.OPERATIONS[name](image, magnitude, sign)
    expected = _tensor(ENHANCED[name](_pillow(image)).enhance(factor))
    inner = (slice(None), slice(1, -1), slice(1, -1))  # borders are sharpened differently
    assert float((found - expected)[inner].abs().max()) < 2.1 / 255


@pytest.mark.parametrize(
    ("name", "magnitude", "pillow"),
    [
        ("invert", 0, ImageOps.invert),
        ("posterize", 5, lambda i: ImageOps.posterize(i, 6)),
        ("posterize", 9, lambda i: ImageOps.posterize(i, 4)),
        ("solarize", 4, lambda i: ImageOps.solarize(i, 143)),  # 142.2: below it stays
        ("solarize", 0, lambda i: i),
        ("equalize", 3, ImageOps.equalize),
        ("autocontrast", 3, ImageOps.autocontrast),
    ],
)
def test_lookups_are_pillows(name: str, magnitude: int, pillow: object) -> None:
    image = _photo()
    found = _operations.OPERATIONS[name](image, magnitude, 1)
    expected = _tensor(pillow(_pillow(image)))  # type: ignore[operator]  # a table of callables
    assert float((found - expected).abs().max()) < 1.1 / 255


@pytest.mark.parametrize("sign", [1, -1])
def test_a_translation_moves_whole_pixels_and_leaves_black(sign: int) -> None:
    image = _photo(33) + 0.001
    pixels = round(150 / 331 * 3 / 9 * 33)
    found = _operations.OPERATIONS["translateY"](image, 3, sign)
    expected = torch.zeros_like(image)
    if sign > 0:
        expected[:, pixels:] = image[:, :-pixels]
    else:
        expected[:, :-pixels] = image[:, pixels:]
    torch.testing.assert_close(found, expected)


def test_a_policy_is_its_operations_in_order_and_repeats_itself() -> None:
    image = _photo()
    signs = [1, -1, 1]
    found = _operations.transformed(image, (3, 1, 7), signs)
    step = image
    for index, sign in zip((3, 1, 7), signs, strict=True):
        name, magnitude = _operations.LIBRARY[index]
        step = _operations.OPERATIONS[name](step, magnitude, sign).clamp(0, 1)
    assert torch.equal(found, step)
    assert torch.equal(found, _operations.transformed(image, (3, 1, 7), signs))
    assert torch.equal(_operations.transformed(image, (), ()), image)


def test_with_the_draws_granted_the_transformed_batch_is_an_exact_zero() -> None:
    view, x = observed(ATS(), grants=SECRETS)
    g = dict(view.update.tensors)
    chosen, signs = (
        next(t for n, t in view.secrets.items() if n.endswith(what)) for what in ("chosen", "signs")
    )
    trained_on = ATS().transformed(x, chosen, signs, BOX)
    assert relative_error(replayed(view, trained_on), g) < 1e-9
    assert relative_error(replayed(view, x), g) > 1e-2


def test_the_first_layer_gives_the_transformed_image_exactly() -> None:
    stage = build_stage(model="fc", settings={"widths": (24, 16)}, examples=1, defenses=(ATS(),))
    stage.federation.play_round()
    memory = stage.federation.clients[0].memories["ats"]
    found, x = first_layer_readout(ATS())
    sent = (
        ATS()
        .transformed(x.reshape(1, 3, 8, 8), memory["chosen"][0], memory["signs"][0], BOX)
        .flatten()
    )
    assert float((found - sent).abs().max()) < 1e-9
    assert float((found - x).abs().max()) > 0.1


def test_every_local_step_draws_anew_and_a_round_forgets_the_last() -> None:
    stage = build_stage(
        model="convnet", settings={"width": 4}, examples=2, defenses=(ATS(),),
        protocol=FedAVG(epochs=3, batch_size=1, lr=0.01),
    )  # fmt: skip
    for _ in range(2):
        stage.federation.play_round()
        secrets = ATS().secrets(stage.federation.clients[0].memories["ats"])
        assert secrets["chosen"].shape == (6,)
        assert secrets["signs"].shape == (6, 3)
    assert len({tuple(s) for s in secrets["signs"].tolist()}) > 1


def test_images_are_transformed_as_pixels() -> None:
    """Inverting in model space would be something else."""
    x = BOX.normalize(_photo(8)[None].double())
    inverting = ATS(operations=1, policies=((0, 0, 0),))
    chosen, signs = torch.zeros(1, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64)
    found = BOX.denormalize(inverting.transformed(x, chosen, signs, BOX))
    torch.testing.assert_close(found, 1 - BOX.denormalize(x))
    plain = inverting.transformed(_photo(8)[None], chosen, signs, None)
    torch.testing.assert_close(plain, 1 - _photo(8)[None])
    with pytest.raises(InvalidInput, match="2 channels"):
        inverting.transformed(torch.rand(1, 2, 8, 8), chosen, signs, None)


def test_policies_outside_the_library_are_refused() -> None:
    for policies in (((50, 0, 0),), ((0, 0),), ()):
        with pytest.raises(InvalidParameter, match="policies"):
            ATS(policies=policies)


# -- the search ----------------------------------------------------------------------------------


def _networks() -> tuple[torch.nn.Module, torch.nn.Module]:
    return tuple(  # type: ignore[return-value]  # two of them
        models.build("lenet", size=8, width=4, classes=2, seed=s).double().eval() for s in (0, 1)
    )


def _public() -> ImageSet:
    found = bundled.photos(8)
    return ImageSet(found.images[:6], torch.tensor([0, 0, 0, 1, 1, 1]), ("a", "b"), "six")


def test_the_privacy_score_is_the_area_under_the_cosines() -> None:
    model, _ = _networks()
    draw = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 1, 3, 8, 8, generator=draw, dtype=torch.float64)
    y = torch.zeros(1, dtype=torch.int64)
    assert _search.privacy_score(model, x, y, x) == pytest.approx(1)

    def slopes(at: Tensor) -> list[Tensor]:
        loss = torch.nn.functional.cross_entropy(model(at), y)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    heights = []
    for i in range(21):
        pairs = zip(slopes(i / 20 * x + (1 - i / 20) * noise), slopes(x), strict=True)
        cosines = [torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in pairs]
        heights.append(float(torch.stack(cosines).mean()))
    area = sum((a + b) / 2 for a, b in itertools.pairwise(heights)) / 20
    assert _search.privacy_score(model, x, y, noise) == pytest.approx(area)


def test_the_privacy_score_does_not_see_positive_factors_on_gradients() -> None:
    model, _ = _networks()
    draw = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 1, 3, 8, 8, generator=draw, dtype=torch.float64)
    y = torch.zeros(1, dtype=torch.int64)
    before = _search.privacy_score(model, x, y, noise)
    original = _search._slopes

    def thrice(*arguments: object) -> dict[str, Tensor]:
        found = original(*arguments)  # type: ignore[arg-type]  # passed on as they came
        return {n: 3 * t for n, t in found.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_search, "_slopes", thrice)
        assert _search.privacy_score(model, x, y, noise) == pytest.approx(before)


def test_the_accuracy_score_of_uncorrelated_rows_has_a_closed_form() -> None:
    n, k = 4, 1e-5
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    rows = torch.cat([signs, -signs], dim=1).double()  # mean 0, mutually orthogonal
    expected = -n * (math.log(1 + k) + 1 / (1 + k))
    assert _search.correlation_score(rows) == pytest.approx(expected)
    alike = rows + 100 * rows[:1]
    assert _search.correlation_score(alike) < expected - 10


def test_the_search_ranks_by_privacy_and_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, fresh = _networks()
    settings = {"box": BOX, "candidates": 4, "images": 1, "threshold": None, "keep": 3}
    first = ats.searched(_public(), trained, fresh, **settings)  # type: ignore[arg-type]
    assert len(first) == 3
    means = []
    for policy in first:
        noise = torch.Generator().manual_seed(0)
        _search._under(policy, _public().images, noise)  # the draws of the accuracy score
        means.append(_search._privacy_by_class(policy, _public(), trained, BOX, 1, noise))
    assert means[0][0] <= means[-1][0] + 1e-9
    monkeypatch.setattr(_search, "privacy_score", None)  # kept: nothing is computed again
    assert ats.searched(_public(), trained, fresh, **settings) == first  # type: ignore[arg-type]
    assert ATS(policies=first).policies == first


def test_a_search_without_an_accurate_policy_says_so(cache: Path) -> None:
    trained, fresh = _networks()
    with pytest.raises(Unavailable, match="lower threshold"):
        ats.searched(_public(), trained, fresh, box=BOX, candidates=2, images=1, threshold=1e9)
