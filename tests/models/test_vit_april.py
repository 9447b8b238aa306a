"""The ViT whose first attention reads the embedded tokens as they are."""

import pytest
import torch
from torch import Tensor, nn

from leakatlas.errors import UnknownName
from leakatlas.models import ViT, build


def _seen_by_attention(model: ViT, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    handle = first.register_forward_hook(lambda _m, given, _o: seen.append(given[0].detach()))
    model(x)
    handle.remove()
    return seen[0]


def test_attention_reads_tokens_plus_positions_and_nothing_bypasses_it() -> None:
    model = ViT(size=8, dim=16, first_block="april").double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    patches = model.embed(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), patches], dim=1) + model.positions
    assert torch.equal(_seen_by_attention(model, x), tokens)
    with torch.no_grad():  # without the attention's output no image reaches the logits
        attention = model.blocks[0].get_submodule("attention.out")
        for parameter in attention.parameters():
            parameter.zero_()
    assert torch.allclose(model(x), model(torch.zeros_like(x)), atol=1e-12)


def test_only_the_first_block_differs_from_the_usual_vit() -> None:
    april = set(ViT(first_block="april").state_dict())
    usual = set(ViT().state_dict())
    assert usual - april == {"blocks.0.norm1.weight", "blocks.0.norm1.bias"}
    assert april < usual


def test_it_is_a_setting_of_the_registered_vit_and_others_are_unknown() -> None:
    model = build("vit", first_block="april", depth=1, dim=16, in_channels=1, size=8, classes=3)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    with pytest.raises(UnknownName, match="first block of a ViT 'postnorm'"):
        ViT(first_block="postnorm")
