"""SDP in plain PyTorch: surgery, smoothing, maps and scores."""

import math

import open_clip
import pytest
import torch
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from torch.nn import functional as F

from anomalib_clipad.components import DualPathFeatures, GaussianSmoothing, MapScale, ScoreFusion, feature_surgery
from anomalib_clipad.components.smoothing import gaussian_matrix
from anomalib_clipad.components.surgery import surgery_scores
from anomalib_clipad.engine.post_processing import ClipAdPostProcessor
from anomalib_clipad.errors import InputError
from anomalib_clipad.sdp import ClipAdSdpModel

from .conftest import Parity, make_clip
from .test_dual_path import naive


@pytest.fixture(scope="module")
def release(parity: Parity, parity_clip: open_clip.CLIP) -> ClipAdSdpModel:
    """SDP as the release ran it for the parity numbers."""
    return ClipAdSdpModel(
        clip=parity_clip, class_names=parity.meta["classes"], rvs="mean", sigma=parity.meta["smoothing"]
    )


def test_fused_scores_equal_release(parity: Parity) -> None:
    taps = [parity[f"features/surgery/{layer}"] for layer in parity.meta["features_list"]]
    text = parity.text_features()[parity["input/class_index"]]
    torch.testing.assert_close(feature_surgery(taps, text), parity["sdp/similarity"], atol=1e-5, rtol=0)


def test_maps_and_scores_equal_release(parity: Parity, release: ClipAdSdpModel) -> None:
    scores = release.scores(parity["input/image"], parity["input/class_index"])
    torch.testing.assert_close(scores.anomaly_map, parity["sdp/map"], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.text_score, parity["sdp/text_score"], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.map_score, parity["sdp/map_score"], atol=1e-5, rtol=0)


def test_map_before_smoothing_equals_release(parity: Parity, release: ClipAdSdpModel) -> None:
    taps = [parity[f"features/surgery/{layer}"] for layer in parity.meta["features_list"]]
    text = parity.text_features()[parity["input/class_index"]]
    ours, _ = release.map_before_smoothing(DualPathFeatures([], taps), text)
    torch.testing.assert_close(ours, parity["sdp/map_before_smoothing"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("method", "key"), [("dbscan", "dbscan/mvtec"), ("pca", "pca")])
def test_text_vectors_equal_release(parity: Parity, parity_clip: open_clip.CLIP, method: str, key: str) -> None:
    model = ClipAdSdpModel(clip=parity_clip, class_names=parity.meta["classes"], rvs=method)
    torch.testing.assert_close(model.text_features, parity.text_features(key), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stages", [1, 3])
def test_surgery_follows_the_long_form(stages: int) -> None:
    taps = [torch.randn(2, 10, 7).double() for _ in range(stages)]
    text = F.normalize(torch.randn(2, 2, 7).double(), dim=-1)

    def long_form(with_weights: bool) -> torch.Tensor:
        total = torch.zeros(2, 10, 2).double()
        for tokens in taps:
            f = F.normalize(tokens, dim=-1)
            p = (f[:, :1] @ text.transpose(1, 2)).softmax(-1)  # (B, 1, 2)
            w = p / p.mean(-1, keepdim=True) if with_weights else torch.ones_like(p)
            weighted = (w[..., None] * f[:, :, None] * text[:, None]).transpose(1, 2)  # (B, 2, N, D)
            total += (weighted - weighted.mean(1, keepdim=True)).sum(-1).transpose(1, 2)
        return total

    given = [tokens.float() for tokens in taps], text.float()
    torch.testing.assert_close(feature_surgery(*given).double(), long_form(with_weights=True), atol=1e-6, rtol=0)
    # What the class token's weights add to the patches, on average.
    added = (long_form(with_weights=True) - long_form(with_weights=False))[:, 1:, 1].mean(dim=1)
    assert added.abs().min() > 1e-3
    torch.testing.assert_close(surgery_scores(*given).offset.double(), added, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("size", "sigma"), [((240, 240), 8.0), ((17, 40), 3.3), ((5, 6), 9.0), ((1, 3), 2.0), ((8, 8), 0)]
)
def test_smoothing_equals_scipys(size: tuple[int, int], sigma: float) -> None:
    maps = torch.rand(2, *size)
    expected = torch.stack([torch.from_numpy(gaussian_filter(m.double().numpy(), sigma)) for m in maps])
    torch.testing.assert_close(GaussianSmoothing(size, sigma)(maps).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sigma", [0.4, 1.4, 2.1, 3.3, 8.0])
def test_the_kernel_ends_where_scipys_does(sigma: float) -> None:
    """Four standard deviations away, rounded; what is behind is too little to be seen in float32."""
    line = torch.rand(80, dtype=torch.float64)
    expected = torch.from_numpy(gaussian_filter1d(line.numpy(), sigma))
    torch.testing.assert_close(gaussian_matrix(80, sigma) @ line, expected, atol=1e-12, rtol=0)


def test_smoothing_refuses_a_negative_sigma() -> None:
    with pytest.raises(InputError, match="sigma must be a number of pixels, 0 or more, got -1"):
        ClipAdSdpModel(clip=make_clip(), sigma=-1.0)


def test_a_score_that_is_the_same_for_all_images_says_nothing() -> None:
    fusion = ScoreFusion(MapScale(centre=0.0, slope=50.0))
    fused = fusion.fit(torch.tensor([0.2, 0.4]), torch.tensor([0.1, 0.1]))
    torch.testing.assert_close(fused, torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(fusion(torch.tensor([0.3]), torch.tensor([0.1])), torch.tensor([0.25]))


def test_the_whole_follows_the_equations_at_another_shape() -> None:
    vision = {"layers": 8, "patch_size": 4, "image_size": (24, 40), "quick_gelu": True}
    model = ClipAdSdpModel(clip=make_clip(**vision), class_names=["cup", "steel pipe"], rvs="mean", sigma=2.5)
    images, index = torch.randn(3, 3, 24, 40), torch.tensor([1, 0, 1])
    scores = model.scores(images, index)

    with torch.no_grad():
        _, taps = naive(make_clip(**vision).visual, images, [2, 4, 6, 8])
    text = model.text_features.double()[index]
    similarity = feature_surgery([t.float() for t in taps.values()], text.float())[:, 1:, 1].double()
    raw = F.interpolate(similarity.reshape(3, 1, 6, 10), size=(24, 40), mode="bilinear", align_corners=False)
    for image in range(3):
        expected = torch.from_numpy(gaussian_filter(raw[image, 0].numpy(), 2.5))
        torch.testing.assert_close(scores.anomaly_map[image].double(), expected, atol=1e-5, rtol=0)
        assert abs(scores.map_score[image].item() - expected.max().item()) < 1e-5
        logits = 100 * F.normalize(taps[8][image, 0], dim=0) @ text[image].T
        assert abs(scores.text_score[image].item() - logits.softmax(0)[1].item()) < 1e-4


def test_batch_of_mixed_classes_equals_one_by_one(release: ClipAdSdpModel, parity: Parity) -> None:
    images, index = parity["input/image"], torch.tensor([1, 0, 1])
    together = release(images, index)
    for i in range(3):
        alone = release(images[i : i + 1], index[i : i + 1])
        torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[i], atol=2e-6, rtol=0)
        torch.testing.assert_close(alone.pred_score[0], together.pred_score[i], atol=2e-6, rtol=0)
    other = release(images, torch.tensor([0, 0, 1]))
    assert (other.anomaly_map[0] - together.anomaly_map[0]).abs().max() > 1e-4


def test_image_size_other_than_native(parity_clip: open_clip.CLIP) -> None:
    model = ClipAdSdpModel(clip=parity_clip, class_names=["bottle"], image_size=(128, 64))
    assert model(torch.randn(1, 3, 128, 64)).anomaly_map.shape == (1, 128, 64)
    assert model.sigma == pytest.approx(8 * (128 * 64) ** 0.5 / 240)


def test_image_score_without_validation_stays_in_the_unit_interval(release: ClipAdSdpModel, parity: Parity) -> None:
    prediction = release(parity["input/image"])
    assert ((prediction.pred_score > 0) & (prediction.pred_score < 1)).all()
    assert release.score_limits == (0.0, 1.0)


def test_image_score_with_ranges_is_the_papers(parity: Parity, parity_clip: open_clip.CLIP) -> None:
    model = ClipAdSdpModel(clip=parity_clip, class_names=["bottle"])
    scores = model.scores(parity["input/image"])
    text, maps = scores.text_score.double(), scores.map_score.double()
    model.fusion.fit(scores.text_score, scores.map_score)
    expected = ((text - text.min()) / (text.max() - text.min()) + (maps - maps.min()) / (maps.max() - maps.min())) / 2
    torch.testing.assert_close(model(parity["input/image"]).pred_score.double(), expected, atol=1e-5, rtol=0)


def test_squashing_never_saturates() -> None:
    values = torch.linspace(-4, 4, 8001)
    squashed = MapScale(0.0, 50.0).squash(values)
    assert (squashed.diff() > 0).all()
    assert squashed.min() > 0
    assert squashed.max() < 1
    assert MapScale(0.0, 50.0).squash(torch.zeros(1)).item() == 0.5


def test_an_image_that_is_not_a_number_spoils_no_other_and_counts_as_anomalous(
    release: ClipAdSdpModel, parity: Parity
) -> None:
    images = parity["input/image"].clone()
    expected = release(images)
    images[1, 0, 5, 5] = math.nan
    prediction = release(images)
    assert prediction.pred_score[1].isnan()
    processed = ClipAdPostProcessor(release.map_scale)(prediction)
    assert processed.pred_label[1]
    assert processed.pred_mask[1].all()
    for i in (0, 2):
        torch.testing.assert_close(prediction.anomaly_map[i], expected.anomaly_map[i])


def test_clip_stays_frozen_and_in_eval_mode() -> None:
    model = ClipAdSdpModel(clip=make_clip(), class_names=["cup"]).train()
    assert not model.visual.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_half_precision_towers_score_in_float32(parity: Parity) -> None:
    model = ClipAdSdpModel(clip=parity.clip(), class_names=parity.meta["classes"], rvs="mean", sigma=4)
    expected = model(parity["input/image"]).anomaly_map
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = model(parity["input/image"]).anomaly_map
    assert ours.dtype == torch.float32
    assert (ours - expected).abs().max() < 2e-2 * (expected.max() - expected.min())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rvs": "median"}, "got 'median'"),
        ({"rvs": {"eps": 0.5}}, "rvs must name its method"),
        ({"class_names": "bottle"}, "class_names must be a list"),
        ({"class_names": [""]}, "class_name is empty"),
        ({"image_size": 30}, "multiple of the tower's patch size 8 x 8, got 30 x 30"),
        ({"image_size": -8}, "image_size must be one or two positive numbers"),
        ({"layers": [9]}, "between 1 and 4"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(arguments: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ClipAdSdpModel(clip=make_clip(), **arguments)


def test_a_model_without_a_class_says_so() -> None:
    with pytest.raises(InputError, match="No class is set"):
        ClipAdSdpModel(clip=make_clip())(torch.randn(1, 3, 32, 32))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match=r"takes images of \(32, 32\) pixels, got \(40, 40\)"):
        ClipAdSdpModel(clip=make_clip(), class_names=["cup"])(torch.randn(1, 3, 40, 40))


def test_ranges_are_fitted_after_a_run_in_inference_mode() -> None:
    fusion = ScoreFusion(MapScale(0.0, 50.0))
    with torch.inference_mode():
        fusion.reset(2)
    fused = fusion.fit(torch.tensor([0.2, 0.6]), torch.tensor([0.1, 0.3]), number=1)
    torch.testing.assert_close(fused, torch.tensor([0.0, 1.0]))


def test_ranges_of_a_class_leave_those_of_the_others() -> None:
    fusion = ScoreFusion(MapScale(0.0, 50.0))
    fusion.reset(3)
    fusion.fit(torch.tensor([0.2, 0.6]), torch.tensor([0.1, 0.3]), number=1)
    assert fusion.score_min.isfinite().all(dim=1).tolist() == [False, True, False]
    assert fusion.score_max.isfinite().all(dim=1).tolist() == [False, True, False]


def test_ranges_that_a_version_of_one_class_has_written_are_read() -> None:
    fusion = ScoreFusion(MapScale(0.0, 50.0))
    fusion.load_state_dict({"score_min": torch.tensor([0.2, 0.1]), "score_max": torch.tensor([0.6, 0.3])})
    torch.testing.assert_close(fusion(torch.tensor([0.4]), torch.tensor([0.2])), torch.tensor([0.5]))
