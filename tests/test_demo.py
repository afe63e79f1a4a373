"""The demonstration: its pictures, and what its backbone has learned, on surfaces held out from training."""

import hashlib
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torchvision.transforms.v2.functional import normalize, resize

from anomalib_clipad import ClipAdSdp, InputError
from anomalib_clipad.components.scores import Scores
from anomalib_clipad.data import AuxiliaryDataModule, DemoTextures
from anomalib_clipad.demo.datamodule import write_category
from anomalib_clipad.demo.defects import DEFECTS
from anomalib_clipad.demo.textures import HELD_OUT, TRAINING, VALIDATION
from anomalib_clipad.plugin import DEMO_FOLDER
from anomalib_clipad.sdp import ClipAdSdpModel
from anomalib_clipad.sdp_plus import ClipAdSdpPlusModel, load_adapter

from .commands import run_in_process
from .conftest import ROOT, new_engine
from .test_export import run_openvino

CATEGORIES = tuple(HELD_OUT)
CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("textures")
    for name in CATEGORIES:
        write_category(root, name)
    return root


def test_pictures_are_the_same_everywhere(textures: Path, tmp_path: Path) -> None:
    write_category(tmp_path, "gravel")

    def digests(root: Path) -> dict[str, str]:
        files = sorted((root / "gravel").rglob("*.png"))
        return {
            str(f.relative_to(root)): hashlib.sha256(np.asarray(Image.open(f)).tobytes()).hexdigest() for f in files
        }

    assert digests(tmp_path) == digests(textures)
    assert len(digests(tmp_path)) == 12 + 10 + 2 * 3 * len(DEFECTS)
    assert not list(tmp_path.glob(".*"))


def test_a_defect_is_where_its_mask_says_and_can_be_seen(textures: Path) -> None:
    """Against the surface around it, as far as a mean colour shows it."""
    for name in CATEGORIES:
        for mask_path in (textures / name / "ground_truth").rglob("*.png"):
            mask = np.asarray(Image.open(mask_path)) > 0
            image = textures / name / "test" / mask_path.parent.name / mask_path.name.replace("_mask", "")
            picture = np.asarray(Image.open(image)).astype(float) / 255
            assert 4e-4 < mask.mean() < 0.12, mask_path
            shape = np.abs(picture[mask] - np.median(picture, axis=(0, 1))).max()
            assert shape > 0.1, image


def test_the_data_module_is_anomalibs_own(tmp_path: Path) -> None:
    data = DemoTextures(root=tmp_path, category="gravel", num_workers=0, eval_batch_size=4)
    data.prepare_data()
    data.setup()
    labels = data.test_data.samples.label_index
    assert (len(data.train_data), int((labels == 0).sum()), int((labels == 1).sum())) == (12, 10, 24)
    assert next(iter(data.test_dataloader())).gt_mask.shape[-2:] == (256, 256)
    with pytest.raises(InputError, match="category must be one of .*linen.*got 'lace'"):
        DemoTextures(category="lace")


def test_nothing_held_out_can_be_trained_on(tmp_path: Path) -> None:
    data = DemoTextures(root=tmp_path)
    assert not set(HELD_OUT) & {*data.auxiliary_categories, *TRAINING, *VALIDATION}
    auxiliary = AuxiliaryDataModule(data, categories=["linen"], num_workers=0)
    with pytest.raises(InputError, match="no folder of the categories linen"):
        auxiliary.setup()


class Scored:
    """A category's images, masks and labels, and the taps and scores of a model."""

    def __init__(self, model: ClipAdSdpModel, root: Path, name: str) -> None:
        paths = sorted((root / name / "test").rglob("*.png"))
        images = torch.stack([read_image(path, as_tensor=True) for path in paths])
        self.images = normalize(resize(images, [96, 96], interpolation=3, antialias=True), model.mean, model.std)
        self.labels = np.array([path.parent.name != "good" for path in paths])
        self.masks = np.zeros((len(paths), 96, 96), dtype=bool)
        for index in self.labels.nonzero()[0]:
            path = root / name / "ground_truth" / paths[index].parent.name / f"{paths[index].stem}_mask.png"
            self.masks[index] = np.asarray(Image.open(path).resize((96, 96), Image.Resampling.NEAREST)) > 0
        model.set_classes([name])
        self.text_features = model.text_features.clone()
        with torch.no_grad():
            self.features = model.visual(self.images)
        self.scores = model.scores_of(self.features)

    def image_auroc(self, model: ClipAdSdpModel) -> float:
        return roc_auc_score(self.labels, model.fusion.fit(self.scores.text_score, self.scores.map_score))

    def pixel_auroc(self, scores: Scores | None = None) -> float:
        return roc_auc_score(self.masks.ravel(), (scores or self.scores).anomaly_map.ravel())

    def pixel_ap(self) -> float:
        return average_precision_score(self.masks.ravel(), self.scores.anomaly_map.ravel())


@pytest.fixture(scope="module")
def sdp() -> ClipAdSdpModel:
    return ClipAdSdpModel(backbone="demo")


@pytest.fixture(scope="module")
def scored(sdp: ClipAdSdpModel, textures: Path) -> list[Scored]:
    return [Scored(sdp, textures, name) for name in CATEGORIES]


def test_sdp_is_far_above_chance(sdp: ClipAdSdpModel, scored: list[Scored]) -> None:
    assert np.mean([one.image_auroc(sdp) for one in scored]) > 0.9
    assert np.mean([one.pixel_auroc() for one in scored]) > 0.9


def test_sdp_plus_is_above_sdp(scored: list[Scored], textures: Path) -> None:
    plus = ClipAdSdpPlusModel(backbone="demo")
    trained_on = load_adapter(plus.requires_grad_(requires_grad=False).adapter, "demo")
    assert set(trained_on) == set(TRAINING)
    sharper = [Scored(plus, textures, name) for name in CATEGORIES]
    assert np.mean([one.pixel_auroc() for one in sharper]) > 0.95
    assert np.mean([one.pixel_auroc() for one in sharper]) > np.mean([one.pixel_auroc() for one in scored])
    assert np.mean([one.pixel_ap() for one in sharper]) > np.mean([one.pixel_ap() for one in scored]) + 0.01


def test_the_dual_path_is_far_above_the_original_path(sdp: ClipAdSdpModel, scored: list[Scored]) -> None:
    """The paper's claim; here, the original path is even worse than chance."""
    tower = sdp.visual.visual
    figures = []
    for one in scored:
        sdp.text_features = one.text_features
        with torch.no_grad():
            original = [tower.ln_post(tokens) @ tower.proj for tokens in one.features.original]
        figures.append(one.pixel_auroc(sdp.scores_of(one.features._replace(surgery=original))))
    assert np.mean([one.pixel_auroc() for one in scored]) > np.mean(figures) + 0.2


def test_shuffled_text_vectors_are_at_chance(sdp: ClipAdSdpModel, scored: list[Scored]) -> None:
    generator = torch.Generator().manual_seed(0)
    figures = []
    for one in scored:
        for _ in range(5):
            order = torch.randperm(sdp.visual.embed_dim, generator=generator)
            sdp.text_features = one.text_features[..., order]
            figures.append(one.pixel_auroc(sdp.scores_of(one.features)))
    assert abs(np.mean(figures) - 0.5) < 0.15


def test_normal_and_anomalous_swapped_mirror_map_and_score(sdp: ClipAdSdpModel, scored: list[Scored]) -> None:
    one = scored[0]
    sdp.text_features = one.text_features.flip(1)
    swapped = sdp.scores(one.images)
    torch.testing.assert_close(swapped.anomaly_map, -one.scores.anomaly_map, atol=1e-6, rtol=0)
    torch.testing.assert_close(swapped.text_score, 1 - one.scores.text_score, atol=1e-6, rtol=0)


def test_a_flipped_picture_gives_the_flipped_map_nearly(sdp: ClipAdSdpModel, scored: list[Scored]) -> None:
    one = scored[0]
    sdp.text_features = one.text_features
    flipped = sdp.scores(one.images.flip(-1)).anomaly_map.flip(-1)
    assert np.corrcoef(flipped.ravel(), one.scores.anomaly_map.ravel())[0, 1] > 0.9


@pytest.mark.slow
def test_fewer_bits_give_the_same_figures(textures: Path, tmp_path: Path) -> None:
    """As means: in one category two of 34 images that change places are worth 0.008 of the image AUROC."""

    def figures(precision: str) -> dict[str, float]:
        engine = new_engine(tmp_path, precision=precision)
        model = ClipAdSdp(backbone="demo", visualizer=False, page=False)
        tests = [
            engine.test(model, datamodule=DemoTextures(textures, name, num_workers=0), verbose=False)[0]
            for name in CATEGORIES
        ]
        return {key: float(np.mean([test[key] for test in tests])) for key in tests[0]}

    exact = figures("32-true")
    assert len(exact) == 9
    for precision in ("bf16-true", "bf16-mixed", "16-true"):
        assert figures(precision) == pytest.approx(exact, abs=0.005), precision


@pytest.mark.slow
def test_eight_bits_keep_the_verdicts_of_references(textures: Path, tmp_path: Path) -> None:
    """Distances from references are small differences; in eight bits every good part was called anomalous."""
    model = ClipAdSdp(backbone="demo", k_shot=4, false_alarm_rate=0.1, visualizer=False, page=False)
    data = DemoTextures(textures, "linen", num_workers=0)
    new_engine(tmp_path).validate(model, datamodule=data, verbose=False)
    path = model.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ, datamodule=data)
    assert path.with_suffix(".bin").stat().st_size < 0.5 * sum(p.nbytes for p in model.model.visual.parameters())
    pictures = sorted((textures / "linen/test").glob("*/*.png"))
    pixels = torch.stack([read_image(picture, as_tensor=True) for picture in pictures])
    with torch.no_grad():
        expected = model.eval()(pixels)
    found = run_openvino(path, pixels.numpy())
    differing = found["pred_label"].ravel() != expected.pred_label.numpy()
    assert differing.sum() <= 1  # a score next to the threshold
    assert (found["pred_mask"].squeeze() != expected.pred_mask.numpy()).mean() < 0.03


def test_it_says_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    ClipAdSdpModel(backbone="demo")
    assert "not for inspection work" in caplog.text
    assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) < 10e6


def test_words_it_never_read_are_one_unknown_word(sdp: ClipAdSdpModel) -> None:
    """An unusual name then has no random effect on the scores."""
    encoder = sdp.text_encoder
    strange = encoder.encode(["a photo of a flawless zygomorphic.", "a photo of a flawless quetzal."])
    known = encoder.encode(["a photo of a flawless wood.", "a photo of a damaged wood."])
    towards_normal = strange @ (known[0] - known[1])
    assert bool((towards_normal > 0).all())


@pytest.mark.slow
def test_the_demonstration_runs_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load((CONFIGS / "demo.yaml").read_text())
    config["compare"]["data"]["init_args"]["category"] = "capsule"
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(config))

    def refuse(*_: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HOME", str(tmp_path))  # where weights might lie already
    done = run_in_process("compare", "--config", "demo.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = (tmp_path / "results/demo/report.md").read_text()
    assert "Failed" not in report
    assert all(f"| {name} |" in report for name in ("SDP", "SDP+", "PatchCore"))
    assert (tmp_path / "results/demo/examples/capsule.png").is_file()
