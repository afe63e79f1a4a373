"""The text side: prompts, their encoding, and the vector that represents them."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional as F

from anomalib_clipad.components import PromptEnsemble, TextEncoder, select_representative_vector
from anomalib_clipad.components.representative_vector import check_rvs
from anomalib_clipad.errors import InputError

from .conftest import Parity, make_clip

CLASSES = ("bottle", "metal_nut")
STATES = ("normal", "anomalous")


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.mark.parametrize("class_name", CLASSES)
def test_prompts_are_the_releases_in_its_order(parity: Parity, tokenizer: object, class_name: str) -> None:
    for state, prompts in zip(STATES, PromptEnsemble.from_config("industrial").prompts(class_name), strict=True):
        assert torch.equal(tokenizer(prompts).int(), parity[f"prompts/{class_name}/{state}/tokens"])


@pytest.mark.parametrize("class_name", CLASSES)
def test_embeddings_equal_release(
    parity: Parity, parity_clip: open_clip.CLIP, tokenizer: object, class_name: str
) -> None:
    encoder = TextEncoder(parity_clip, tokenizer)
    for state, prompts in zip(STATES, PromptEnsemble.from_config("industrial").prompts(class_name), strict=True):
        expected = parity[f"prompts/{class_name}/{state}/embeddings"]
        torch.testing.assert_close(encoder.encode(prompts), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("custom_text", [False, True])
def test_cut_prompts_encode_as_whole_ones(tokenizer: object, custom_text: bool) -> None:
    clip = make_clip()
    if custom_text:
        config = {
            "vision_cfg": {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8},
            "embed_dim": 24,
        }
        clip = open_clip.CustomTextCLIP(**config, text_cfg={"width": 16, "heads": 2, "layers": 2}).eval()
    prompts = ["cup", "a photo of a cup.", "a cup", "a close-up photo of the cup without contamination.", "cup"]
    with torch.no_grad():
        expected = F.normalize(clip.encode_text(tokenizer(prompts)), dim=-1)
    torch.testing.assert_close(TextEncoder(clip, tokenizer).encode(prompts), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(TextEncoder(clip, tokenizer, batch_size=1).encode(prompts), expected, atol=1e-5, rtol=0)


def test_a_text_tower_that_looks_ahead_is_not_cut(tokenizer: object) -> None:
    vision = {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"width": 16, "heads": 2, "layers": 2, "no_causal_mask": True}
    clip = open_clip.CustomTextCLIP(24, vision, text).eval()
    with torch.no_grad():
        expected = F.normalize(clip.encode_text(tokenizer(["a cup", "cup"])), dim=-1)
    torch.testing.assert_close(TextEncoder(clip, tokenizer).encode(["a cup", "cup"]), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("method", "options", "key"),
    [
        ("mean", {}, "mean"),
        ("pca", {}, "pca"),
        ("kde", {}, "kde"),
        ("dbscan", {}, "dbscan/mvtec"),
        ("dbscan", {"eps": 1.5, "min_samples": 25}, "dbscan/visa"),
        ("mean_shift", {}, "mean_shift"),
    ],
)
@pytest.mark.parametrize("class_name", CLASSES)
def test_representative_vectors_equal_release(
    parity: Parity, class_name: str, method: str, options: dict, key: str
) -> None:
    for column, state in enumerate(STATES):
        cloud = parity[f"prompts/{class_name}/{state}/embeddings"]
        ours = select_representative_vector(cloud, method, **options)
        torch.testing.assert_close(ours, parity[f"rvs/{class_name}/{key}"][:, column], atol=1e-5, rtol=0)


def clouds(dim: int = 6) -> torch.Tensor:
    """Twenty points around one direction, eight around another, one alone."""
    centres = torch.eye(dim)[[0] * 20 + [1] * 8 + [2]]
    return F.normalize(centres + 0.05 * torch.randn(29, dim), dim=-1)


def test_dbscan_takes_the_largest_cluster() -> None:
    cloud = clouds()
    expected = F.normalize(cloud[:20].mean(dim=0), dim=0)
    for order in (torch.arange(29), torch.randperm(29)):
        ours = select_representative_vector(cloud[order], "dbscan", eps=0.5, min_samples=5)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_mean_shift_takes_the_largest_cluster() -> None:
    cloud = clouds()
    ours = select_representative_vector(cloud, "mean_shift", bandwidth=0.5)
    torch.testing.assert_close(ours, F.normalize(cloud[:20].mean(dim=0), dim=0), atol=1e-6, rtol=0)


def test_density_weights_follow_the_equation() -> None:
    cloud = clouds().double()
    distances = ((cloud[:, None] - cloud[None]) ** 2).sum(-1)
    density = torch.exp(-distances / (2 * 0.3**2)).sum(1)
    expected = F.normalize((density[:, None] * cloud).sum(0), dim=0)
    torch.testing.assert_close(select_representative_vector(cloud, "kde"), expected, atol=1e-9, rtol=0)


def test_density_survives_many_dimensions() -> None:
    cloud = F.normalize(torch.randn(50, 4096), dim=-1)
    assert select_representative_vector(cloud, "kde").isfinite().all()


def test_principal_direction_follows_the_equation() -> None:
    cloud = clouds().double()
    samples = cloud.T - cloud.T.mean(dim=0)  # D samples of P features
    values, vectors = torch.linalg.eigh(samples.T @ samples)
    expected = F.normalize(samples @ vectors[:, values.argmax()], dim=0)
    expected = expected * torch.sign(expected @ cloud.mean(dim=0))
    torch.testing.assert_close(select_representative_vector(cloud, "pca"), expected, atol=1e-7, rtol=0)


def test_all_noise_gives_the_mean_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    cloud = F.normalize(torch.randn(10, 5), dim=-1)
    ours = select_representative_vector(cloud, "dbscan", eps=1e-6)
    torch.testing.assert_close(ours, F.normalize(cloud.mean(dim=0), dim=0))
    assert "found no cluster among 10 prompts" in caplog.text


@pytest.mark.parametrize("method", ["mean", "pca", "kde", "dbscan", "mean_shift"])
def test_vectors_are_unit_length_and_keep_the_dtype(method: str) -> None:
    vector = select_representative_vector(clouds().half(), method)
    assert vector.dtype == torch.float16
    assert abs(vector.float().norm().item() - 1) < 1e-3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "median"}, "one of mean, pca, kde, dbscan, mean_shift, got 'median'"),
        ({"method": "dbscan", "bandwidth": 1}, "takes eps, min_samples, got bandwidth"),
        ({"method": "dbscan", "eps": -1.0}, "eps must be a positive number, got -1"),
        ({"embeddings": torch.full((3, 2), np.nan)}, "finite, non-empty"),
        ({"embeddings": torch.empty(0, 2)}, r"got shape \(0, 2\)"),
    ],
)
def test_wrong_use_is_refused_in_a_sentence(arguments: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        select_representative_vector(**{"embeddings": clouds(), **arguments})


def test_own_states_and_templates_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "welds.yaml"
    path.write_text("normal_states: ['sound {}']\nanomalous_states: ['porous {}', 'cracked {}']\ntemplates: ['a {}']\n")
    assert PromptEnsemble.from_config(str(path)).prompts("weld") == (
        ["a sound weld"],
        ["a porous weld", "a cracked weld"],
    )


def test_states_alone_keep_the_industrial_templates() -> None:
    normal, _ = PromptEnsemble.from_config({"normal_states": ["sound {}"]}).prompts("weld")
    assert len(normal) == 22
    assert normal[0] == "a cropped photo of the sound weld."


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("industriall", "industrial, medical.*got 'industriall'"),
        ({"states": ["a {}"]}, "keys normal_states, anomalous_states, templates, got states"),
        ({"templates": []}, "templates must be a list of at least one sentence"),
        ({"templates": "a {}"}, "templates must be a list"),
        ({"normal_states": ["good"]}, "exactly one {}, got 'good'"),
    ],
)
def test_wrong_prompts_are_refused_in_a_sentence(config: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        PromptEnsemble.from_config(config)


@pytest.mark.parametrize("text", ["- a\n- b\n", "templates: [unclosed"])
def test_a_broken_prompt_file_is_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(InputError, match=r"p\.yaml"):
        PromptEnsemble.from_config(tmp_path / "p.yaml")


def test_an_empty_class_name_is_refused() -> None:
    with pytest.raises(InputError, match="class_name is empty"):
        PromptEnsemble.from_config("industrial").prompts("  ")


def test_vectors_are_those_of_full_precision_under_autocast(tokenizer: object) -> None:
    encoder = TextEncoder(make_clip(), tokenizer)
    expected = encoder.encode(["a cup", "a cup with a flaw"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder.encode(["a cup", "a cup with a flaw"]), expected)


def test_prompts_that_are_cut_are_said(tokenizer: object, caplog: pytest.LogCaptureFixture) -> None:
    states = {"normal_states": ["{} without flaw"], "anomalous_states": ["{} with flaw"], "templates": ["a {}"]}
    ensemble = PromptEnsemble.from_config(states)
    encoder = TextEncoder(make_clip(), tokenizer)
    encoder.text_features("screw", ensemble, "mean")
    assert "longer than" not in caplog.text
    encoder.text_features(" ".join(["screw"] * 80), ensemble, "mean")
    assert "2 prompts of 'screw screw" in caplog.text
    assert "are longer than the text tower reads, so their ends are lost" in caplog.text


def test_principal_direction_points_to_the_prompts() -> None:
    """Whatever sign the decomposition gives: one prompt opposite to all others is the longest along the direction."""
    one = F.normalize(torch.randn(1, 8), dim=-1)
    cloud = F.normalize(torch.cat([one, 0.2 * torch.randn(6, 8) - one]), dim=-1)
    assert select_representative_vector(cloud, "pca") @ cloud.mean(dim=0) > 0


def test_defaults_of_the_methods_are_the_papers() -> None:
    assert check_rvs("dbscan") == {"eps": 0.5, "min_samples": 15}
    assert check_rvs("kde") == {"bandwidth": 0.3}
    assert check_rvs("mean_shift") == {"bandwidth": 2.0}
