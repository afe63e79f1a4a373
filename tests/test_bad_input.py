"""Whatever the parts of the method are given, they work or say in a sentence what they need."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.components import (
    DualPathVisionTransformer,
    GaussianSmoothing,
    PromptEnsemble,
    TextEncoder,
    feature_surgery,
    fingerprint,
    load_backbone,
    select_representative_vector,
)
from anomalib_clipad.components.backbone import find_cached
from anomalib_clipad.components.representative_vector import check_rvs, rvs_options
from anomalib_clipad.components.smoothing import gaussian_matrix
from anomalib_clipad.errors import InputError
from anomalib_clipad.sdp_plus import dice_loss, focal_loss

from .conftest import SMALL_CONFIG, make_clip, save_clip

NAN = float("nan")
WRONG = [None, 3, -1, 0.5, NAN, float("inf"), "text", "", [], [None], {"a": 1}, object(), b"bytes", True]
TENSORS = [
    torch.zeros(()),
    torch.zeros(3),
    torch.zeros(1, 2, 3, 4, 5),
    torch.zeros(0, 3, 32, 30),
    torch.ones(1, 1, 32, 32),
    torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    torch.zeros(1, 3, 32, 32, dtype=torch.complex64),
    torch.zeros(1, 3, 32, 32, dtype=torch.bool),
]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(make_clip(), open_clip.get_tokenizer("ViT-B-32"))


@pytest.fixture(scope="module")
def tower() -> DualPathVisionTransformer:
    return DualPathVisionTransformer(make_clip().visual)


def refused(call: Callable[[object], object], values: list) -> Iterator[str]:
    """The sentences with which all these values are refused."""
    for value in values:
        with pytest.raises(InputError) as caught:
            call(value)
        sentence = str(caught.value)
        assert "\n" not in sentence
        assert sentence.endswith("."), sentence
        yield sentence


def but(*allowed: object) -> list:
    return [value for value in WRONG if not any(value is other for other in allowed)]


CLOUD = torch.eye(4)
TAPS = [torch.rand(2, 5, 6)] * 2
TEXT = torch.eye(6)[:2]
MAPS = torch.rand(2, 8, 8)
CASES: dict[str, tuple[Callable[[object], object], list, str]] = {
    "tower": (DualPathVisionTransformer, WRONG, "dual path needs"),
    "layers": (lambda v: DualPathVisionTransformer(make_clip().visual, v), but(None), "layers must be"),
    "map size": (lambda v: GaussianSmoothing(v, 1.0), WRONG, "image_size must be"),
    "map side": (lambda v: GaussianSmoothing((8, v), 1.0), but(3), "side of a map"),
    "sigma": (lambda v: GaussianSmoothing((8, 8), v), but(3, 0.5), "sigma must be a number of pixels"),
    "line": (lambda v: gaussian_matrix(v, 1.0), but(3), "side of a map"),
    "maps": (GaussianSmoothing((8, 8), 1.0), [*WRONG, *TENSORS, MAPS.long()], "maps must be"),
    "prompts": (PromptEnsemble.from_config, WRONG, "prompts"),
    "states": (lambda v: PromptEnsemble(v, ["{}"], ["{}"]), WRONG, "normal_states"),
    "templates": (lambda v: PromptEnsemble.from_config({"templates": v}), WRONG, "templates"),
    "entry": (lambda v: PromptEnsemble.from_config({"templates": ["{}", v]}), WRONG, "exactly one"),
    "keys": (lambda v: PromptEnsemble.from_config({v: ["{}"], "b": 1}), [None, 3, NAN, (), "x"], "keys"),
    "class name": (PromptEnsemble.from_config("industrial").prompts, but("text"), "class_name"),
    "embeddings": (lambda v: select_representative_vector(v, "mean"), [*WRONG, *TENSORS, CLOUD * NAN], "embeddings"),
    "method": (lambda v: select_representative_vector(CLOUD, v), WRONG, "rvs method"),
    "eps": (lambda v: select_representative_vector(CLOUD, "dbscan", eps=v), but(3, 0.5), "eps must be"),
    "min_samples": (lambda v: check_rvs("dbscan", min_samples=v), but(3), "min_samples must be"),
    "bandwidth": (lambda v: check_rvs("kde", bandwidth=v), but(3, 0.5), "bandwidth must be"),
    "rvs": (rvs_options, WRONG, "rvs"),
    "surgery": (lambda v: feature_surgery(v, TEXT), [*WRONG, TENSORS, [TAPS[0], TAPS[0][:1]]], "surgery_features"),
    "text": (lambda v: feature_surgery(TAPS, v), [*WRONG, *TENSORS, TEXT[:1], TEXT.long()], "text_features"),
    "module": (fingerprint, [*WRONG, *TENSORS], "torch module"),
    "backbone": (lambda v: load_backbone(v, None), WRONG, "backbone must be"),
    "pretrained": (lambda v: load_backbone("ViT-B-32", v), but(None), "pretrained must be"),
    "cached": (lambda v: find_cached("ViT-B-32", v), but(None, "text"), "pretrained must be"),
    "probabilities": (lambda v: focal_loss(v, MAPS), [*WRONG, *TENSORS, MAPS], "probabilities must be"),
    "anomalous": (lambda v: dice_loss(v, MAPS), [*WRONG, *TENSORS, MAPS[:1]], "anomalous must be"),
    "masks": (lambda v: dice_loss(MAPS, v), [*WRONG, *TENSORS, MAPS[:, :4]], "masks"),
    "clip": (lambda v: TextEncoder(v, list), [*WRONG, nn.Linear(2, 2)], "clip must be"),
    "tokenizer": (lambda v: TextEncoder(make_clip(), v), WRONG, "tokenizer must be"),
    "batch size": (lambda v: TextEncoder(make_clip(), list, v), but(3), "batch_size must be"),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_arguments_are_refused_in_a_sentence(name: str) -> None:
    call, values, words = CASES[name]
    for sentence in refused(call, values):
        assert words in sentence


def test_wrong_images_are_refused_in_a_sentence(tower: DualPathVisionTransformer) -> None:
    for sentence in refused(tower, [*WRONG, *TENSORS]):
        assert "image" in sentence
    with pytest.raises(InputError, match="normalised as CLIP expects, got torch.uint8"):
        tower(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_images_that_a_model_cannot_take_as_they_are_are_refused_in_a_sentence(small_clip: str) -> None:
    model = ClipAdSdp(backbone=small_clip, class_name="cup")
    wrong = [*WRONG, *(tensor for tensor in TENSORS if len(tensor.shape) != 4 or len(tensor)), np.zeros((1, 3, 40, 50))]
    for sentence in refused(model, wrong):
        assert sentence.startswith("Images must be a floating-point tensor (B, 3, height, width) in [0, 1], got")
    assert model.eval()(torch.rand(1, 3, 40, 50)).anomaly_map.shape == (1, 32, 32)


def test_wrong_image_sizes_are_refused_in_a_sentence(tower: DualPathVisionTransformer) -> None:
    sizes = [*WRONG, (32,), (32, 32, 32), (32, 0), (-8, 8), (8.0, 8), ("8", 8), (NAN, 8)]
    for sentence in refused(tower.grid, sizes):
        assert "image_size must be" in sentence


def test_sizes_that_would_take_all_memory_are_refused(tower: DualPathVisionTransformer) -> None:
    assert tower.grid((1024, 1024)) == (128, 128)
    with pytest.raises(InputError, match="makes 156250000 patches .* at most 16384 are possible"):
        tower.grid((100_000, 100_000))
    with pytest.raises(InputError, match="1 to 8192 pixels, got 100000"):
        GaussianSmoothing((8, 100_000), 1.0)
    with pytest.raises(InputError, match="the largest possible is 8192"):
        GaussianSmoothing((8, 8), 1e9)


def test_a_large_sigma_is_the_mean() -> None:
    matrix = gaussian_matrix(500, 8000.0)
    # The kernel ends at four sigma, where a weight is exp(-8) / (8000 sqrt(2 pi)) = 1.7e-8.
    torch.testing.assert_close(matrix, torch.full_like(matrix, 1 / 500), atol=1.7e-8, rtol=0)


def test_wrong_prompts_for_the_encoder_are_refused_in_a_sentence(encoder: TextEncoder) -> None:
    for sentence in refused(encoder.encode, WRONG):
        assert "prompts must be" in sentence
    for sentence in refused(lambda v: encoder.text_features("cup", v, "mean"), WRONG):
        assert "ensemble must be" in sentence


@pytest.mark.parametrize(
    "tokens",
    [None, [[1]], torch.zeros(3), torch.zeros(1, 300).long(), torch.zeros(1, 7), torch.full((1, 7), 10**6)],
)
def test_a_tokenizer_of_another_clip_is_refused_in_a_sentence(tokens: object) -> None:
    with pytest.raises(InputError, match=r"The tokenizer .* the CLIP's own\.$"):
        TextEncoder(make_clip(), lambda _: tokens).encode(["a cup"])


def test_weights_that_overflow_make_no_text_vectors() -> None:
    clip = make_clip()
    clip.token_embedding.weight.data.fill_(NAN)
    with pytest.raises(InputError, match="text tower gives vectors that are not finite"):
        TextEncoder(clip, open_clip.get_tokenizer("ViT-B-32")).encode(["a cup"])


CONFIGS = [
    "",
    "text",
    "[]",
    "null",
    "[" * 10_000,
    json.dumps({"model_cfg": None}),
    json.dumps({"model_cfg": {}}),
    json.dumps({"model_cfg": {**SMALL_CONFIG, "extra": 1}}),
    *(json.dumps({"model_cfg": {**SMALL_CONFIG, key: v}}) for key in SMALL_CONFIG for v in (None, "a", [], NAN)),
    *(
        json.dumps({"model_cfg": {**SMALL_CONFIG, "vision_cfg": {**SMALL_CONFIG["vision_cfg"], key: value}}})
        for key in ("layers", "width", "patch_size", "image_size")
        for value in (None, "a", -8, 0.5)
    ),
    *(
        json.dumps({"model_cfg": SMALL_CONFIG, "preprocess_cfg": value})
        for value in (
            1,
            "a",
            [1],
            {"mean": 1},
            {"mean": [1, 2]},
            {"std": [0, 1, 1]},
            {"std": [1, 1, NAN]},
            {"std": "a"},
        )
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_wrong_configurations_are_refused_in_a_sentence(tmp_path: Path, config: str) -> None:
    (save_clip(tmp_path) / "open_clip_config.json").write_text(config)
    for _ in refused(load_backbone, [str(tmp_path)]):
        pass


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"\xff\xfe",
        b"\x00",
        b"[]",
        b"a: &a [*a]",
        b"a: 2020-13-45",
        b"!!int '': 1",
        b"!!timestamp a: 1",
        b"? [a]\n: 1",
        b"templates: [1]",
        b"templates: null",
        b"templates: {a: 1}",
        b"[" * 5000,
        b"!!python/object/apply:os.getcwd []",
    ],
)
def test_wrong_prompt_files_are_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_bytes(content)
    for _ in refused(PromptEnsemble.from_config, [path, str(path), str(tmp_path), "n" * 5000, "a\0b"]):
        pass


@pytest.mark.parametrize("ending", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize("content", ["empty", "text", "truncated", "a list", "a folder"])
def test_damaged_weights_are_refused_in_a_sentence(tmp_path: Path, ending: str, content: str) -> None:
    folder = save_clip(tmp_path / "clip")
    whole = (folder / "open_clip_model.safetensors").read_bytes()
    path = tmp_path / f"w{ending}"
    if content == "a folder":
        path.mkdir()
    elif content == "a list":
        torch.save([torch.zeros(2)], path)
    else:
        path.write_bytes({"empty": b"", "text": b"some text", "truncated": whole[:5000]}[content])
    for sentence in refused(lambda v: load_backbone(str(folder), v), [str(path), path]):
        assert path.name in sentence
        assert "weights_only" not in sentence
