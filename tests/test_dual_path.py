"""The staged dual path: the authors' numbers, the equations, and a CLIP left as it was."""

import math

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from torch import nn
from torch.nn import functional as F

from anomalib_clipad.components import DualPathVisionTransformer
from anomalib_clipad.errors import InputError

from .conftest import Parity, make_clip


def test_features_equal_release(parity: Parity, parity_clip: open_clip.CLIP) -> None:
    features = DualPathVisionTransformer(parity_clip.visual)(parity["input/image"])
    for tap, layer in enumerate(parity.meta["features_list"]):
        torch.testing.assert_close(features.surgery[tap], parity[f"features/surgery/{layer}"], atol=2e-5, rtol=0)
        torch.testing.assert_close(features.original[tap], parity[f"features/original/{layer}"], atol=2e-5, rtol=0)


def test_clip_answers_as_before_bit_for_bit(parity: Parity, parity_clip: open_clip.CLIP) -> None:
    images = parity["input/image"]
    state = {key: value.clone() for key, value in parity_clip.state_dict().items()}
    before = parity_clip.encode_image(images)
    DualPathVisionTransformer(parity_clip.visual)(images)
    assert torch.equal(parity_clip.encode_image(images), before)
    assert all(torch.equal(value, state[key]) for key, value in parity_clip.state_dict().items())


def test_last_class_token_is_clips_image_feature(parity: Parity, parity_clip: open_clip.CLIP) -> None:
    images = parity["input/image"]
    surgery = DualPathVisionTransformer(parity_clip.visual)(images).surgery[-1]
    torch.testing.assert_close(surgery[:, 0], parity_clip.encode_image(images), atol=1e-5, rtol=0)


def naive(visual: nn.Module, images: torch.Tensor, layers: list[int]) -> tuple[dict, dict]:
    """Both paths from the equations (method, section 2), head by head, in float64."""
    visual = visual.double()
    x = visual.conv1(images.double()).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    h, s = visual.ln_pre(x), None
    blocks = list(visual.transformer.resblocks)
    attended, outputs, surgery = [], [], []
    for index, block in enumerate(blocks):
        n = block.ln_1(h)
        q, k, v = F.linear(n, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)

        def attend(a: torch.Tensor, b: torch.Tensor, v: torch.Tensor, block: nn.Module = block) -> torch.Tensor:
            heads = []
            for part in torch.arange(v.shape[-1]).chunk(block.attn.num_heads):
                weights = (a[..., part] @ b[..., part].transpose(1, 2) / math.sqrt(len(part))).softmax(-1)
                heads.append(weights @ v[..., part])
            return block.ls_1(block.attn.out_proj(torch.cat(heads, dim=-1)))

        step = attend(v, v, v)
        s = step if index % (len(blocks) // 4) == 0 else s + step
        m = h + attend(q, k, v)
        h = m + block.ls_2(block.mlp(block.ln_2(m)))
        attended.append(m)
        outputs.append(h)
        surgery.append(s)
    original = {tap: attended[tap] if tap < len(blocks) else outputs[-1] for tap in layers}
    projected = {
        tap: visual.ln_post(torch.cat([original[tap][:, :1], surgery[tap - 1][:, 1:]], dim=1)) @ visual.proj
        for tap in layers
    }
    return original, projected


@pytest.mark.parametrize(
    ("vision", "layers"),
    [
        ({}, None),
        ({"layers": 24, "quick_gelu": True}, None),
        ({"act_kwargs": {"approximate": "tanh"}}, None),
        ({"layers": 8, "ls_init_value": 0.3, "patch_size": 4}, [1, 5, 8]),
        ({"layers": 12, "image_size": (24, 40)}, [2, 7]),
        ({"no_ln_pre": True}, [4]),
    ],
)
def test_features_follow_the_equations(vision: dict, layers: list[int] | None) -> None:
    clip = make_clip(**vision)
    size = vision.get("image_size", 32)
    images = torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)))
    tower = DualPathVisionTransformer(clip.visual, layers)
    features = tower(images)
    original, projected = naive(make_clip(**vision).visual, images, tower.layers)
    for tap, layer in enumerate(tower.layers):
        torch.testing.assert_close(features.original[tap].double(), original[layer], atol=2e-5, rtol=0)
        torch.testing.assert_close(features.surgery[tap].double(), projected[layer], atol=2e-5, rtol=0)


@pytest.mark.parametrize("layers", [None, [2, 3], [1]])
def test_sparing_the_original_stream_changes_nothing(layers: list[int] | None) -> None:
    tower = DualPathVisionTransformer(make_clip().visual, layers)
    images = torch.randn(3, 3, 32, 32)
    whole, spared = tower(images), tower(images, with_original=False)
    assert not spared.original
    for a, b in zip(whole.surgery, spared.surgery, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


def test_default_taps_are_the_stage_ends() -> None:
    assert DualPathVisionTransformer(make_clip(layers=12).visual).layers == [3, 6, 9, 12]
    assert DualPathVisionTransformer(make_clip(layers=24).visual).layers == [6, 12, 18, 24]


def test_positions_are_fitted_as_open_clip_does() -> None:
    native, wanted = make_clip(), make_clip(image_size=(48, 40))
    state = native.state_dict()
    resize_pos_embed(state, wanted, antialias=True)
    images = torch.randn(1, 3, 48, 40)
    wanted.load_state_dict(state)
    torch.testing.assert_close(
        DualPathVisionTransformer(native.visual)(images).surgery[-1],
        DualPathVisionTransformer(wanted.visual)(images).surgery[-1],
        atol=1e-5,
        rtol=0,
    )


def test_no_gradient_reaches_a_frozen_tower_but_images_keep_theirs() -> None:
    clip = make_clip().requires_grad_(requires_grad=False)
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    weights = torch.randn(clip.visual.output_dim)
    DualPathVisionTransformer(clip.visual)(images).surgery[-1][:, 0].mul(weights).sum().backward()  # the class token
    (expected,) = torch.autograd.grad(clip.encode_image(images).mul(weights).sum(), images)
    torch.testing.assert_close(images.grad, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        ({"layers": (1, 1, 1, 1), "width": 32, "image_size": 64}, "VisionTransformer with a class token.*ResNet"),
        ({"attentional_pool": True, "attn_pooler_heads": 2, "head_width": 8}, "pools its tokens"),
        ({"pool_type": "avg"}, "pools its tokens"),
        ({"layers": 6}, "4 equal stages, which 6 blocks"),
    ],
)
def test_other_towers_are_refused_in_a_sentence(vision: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        DualPathVisionTransformer(make_clip(**vision).visual)


def test_convnext_is_refused() -> None:
    vision = {"timm_model_name": "convnext_atto", "timm_model_pretrained": False, "image_size": 64}
    clip = open_clip.CLIP(24, vision, {"width": 16, "heads": 2, "layers": 1})
    with pytest.raises(InputError, match="got a TimmModel"):
        DualPathVisionTransformer(clip.visual)


@pytest.mark.parametrize("layers", [[0], [5], [2, 2], [3, 1], [], [1.5]])
def test_taps_out_of_range_are_refused(layers: list) -> None:
    with pytest.raises(InputError, match="between 1 and 4"):
        DualPathVisionTransformer(make_clip().visual, layers)


def test_an_image_that_patches_do_not_tile_is_refused() -> None:
    with pytest.raises(InputError, match="multiple of the tower's patch size 8 x 8, got 30 x 32"):
        DualPathVisionTransformer(make_clip().visual)(torch.randn(1, 3, 30, 32))
