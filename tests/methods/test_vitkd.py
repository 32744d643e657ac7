from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kd_hf.draws import Draws
from kd_hf.errors import UserError
from kd_hf.methods.vitkd import ViTKD
from kd_hf.outputs import Outputs, Target
from kd_hf.testing import check_method, tiny_stages, tiny_vit
from tests.methods.build import build

TOKENS, WIDTH = 9, 4


def shapes(width=WIDTH, tokens=TOKENS, prefix=1):
    return {"block:0": (tokens + prefix, width), "block:1": (tokens + prefix, width), "high": (tokens, width)}


def make(width=WIDTH, channels=WIDTH, **config):
    return build(ViTKD, student=shapes(width), teacher=shapes(channels, prefix=2), **config)


def taps(width=WIDTH, prefix=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {name: (2, *shape) for name, shape in shapes(width, prefix=prefix).items()}
    return {name: torch.rand(shape, dtype=torch.float64, generator=generator) for name, shape in made.items()}


def run(method, student, teacher, noise=None):
    outputs = [Outputs(torch.zeros(2, 1), taps=value) for value in (student, teacher)]
    noise = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(9)) if noise is None else noise
    return method(*outputs, Target(torch.full((2,), -1)), {"noise": noise})


def test_mimicking_sums_over_patches_and_channels_and_ignores_prefix_tokens():
    method, ours, theirs = make(), taps(), taps(prefix=2, seed=1)
    losses = run(method, ours, theirs)
    expected = sum((ours[role][:, 1:] - theirs[role][:, 2:]).square().sum() for role in ("block:0", "block:1"))
    torch.testing.assert_close(losses["mimic"], 3e-5 * expected / 2)
    for role in ("block:0", "block:1"):
        ours[role][:, 0], theirs[role][:, :2] = 7, -7
    assert run(method, ours, theirs) == losses


def test_generation_counts_masked_positions_only_and_divides_by_the_nominal_ratio():
    method, feature = make(mask_ratio=0.3, beta=1), taps()
    for conv in (method.generation[0], method.generation[2]):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    noise = torch.arange(TOKENS).float().expand(2, TOKENS) / TOKENS
    # the identity generator leaves the kept 6 of 9 tokens as they are; the others are 0, as the mask token starts
    expected = feature["high"][:, 6:].square().sum() / 2 / 0.3
    torch.testing.assert_close(
        run(method, feature, taps(prefix=2) | {"high": feature["high"]}, noise)["generation"], expected
    )


def test_the_generator_sees_the_grid_row_by_row():
    method = make(beta=1, mask_ratio=0.5)
    for conv in (method.generation[0], method.generation[2]):
        nn.init.zeros_(conv.bias)
    nn.init.dirac_(method.generation[2].weight)
    with torch.no_grad():  # every position takes the value of its right neighbour
        method.generation[0].weight.zero_()
        method.generation[0].weight[range(WIDTH), range(WIDTH), 1, 2] = 1
    ours, theirs = taps(), taps(prefix=2)
    # kept: the left column and one token more, so every masked position has 0 to its right
    noise = torch.tensor([0, 8, 7, 1, 6, 5, 2, 4, 3.0]).expand(2, TOKENS)
    masked = [1, 2, 4, 5, 7]
    moved = torch.zeros(2, TOKENS, WIDTH, dtype=torch.float64)
    moved[:, 7] = ours["high"][:, 8]
    expected = (moved - theirs["high"])[:, masked].square().sum() / 2 / 0.5
    torch.testing.assert_close(run(method, ours, theirs, noise)["generation"], expected)


def test_aligners_are_separate_and_exist_only_between_different_widths():
    names = [name for name, _ in make(WIDTH, 6).named_parameters() if "align" in name]
    assert names == [f"align_{level}.{kind}" for level in ("low.0", "low.1", "high") for kind in ("weight", "bias")]
    assert not [name for name, _ in make().named_parameters() if "align" in name]


def test_noise_depends_on_the_sample_only():
    method, keys = make(), torch.arange(64)
    noise = method.draw(Draws(keys))["noise"]
    assert noise.shape == (64, TOKENS)
    assert torch.equal(method.draw(Draws(keys[5:7]))["noise"], noise[5:7])


@pytest.mark.parametrize("config", [{"mask_ratio": 0.3}, {"low_blocks": [0, -1]}])
def test_options_keep_the_contract(config):
    check_method(ViTKD, config, tiny_vit("small"), tiny_vit("large", 16, 5))


def test_what_cannot_serve_is_refused_with_the_reason():
    vit, config = tiny_vit("vit"), ViTKD.Config()
    with pytest.raises(UserError, match=r"methods\.vitkd needs a teacher"):
        ViTKD.needs(config, vit, None)
    for pair, side in (((tiny_stages("other"), vit), "student"), ((vit, tiny_stages("other")), "teacher")):
        with pytest.raises(UserError, match=rf"methods\.vitkd\.low_blocks: the {side} 'other' has no.*mgd"):
            ViTKD.needs(config, *pair)
    with pytest.raises(UserError, match=r"'vit' has 4 blocks, 0 to 3; there is no block 4"):
        ViTKD.needs(ViTKD.Config(low_blocks=[0, 4]), vit, tiny_vit("deep", depth=6))
    with pytest.raises(UserError, match="9 patch tokens and the teacher 16"):
        build(ViTKD, student=shapes(), teacher=shapes(tokens=16))
    with pytest.raises(UserError, match="8 patch tokens are no square grid"):
        build(ViTKD, student=shapes(tokens=8), teacher=shapes(tokens=8))
    for wrong in ({"mask_ratio": 0}, {"mask_ratio": 1}, {"low_blocks": []}):
        with pytest.raises(ValidationError):
            ViTKD.Config(**wrong)


def test_cost_counts_aligners_and_convolutions():
    method = make(WIDTH, 6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(method, taps(), taps(6, prefix=2))
    assert counter.get_total_flops() == 2 * 2 * method.cost().macs
