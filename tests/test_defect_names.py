"""Words for what was found: they follow their equations, are given to anomalous images only, and change no figure."""

import csv
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import open_clip
import pytest
import torch
from torch.nn import functional as F

from anomalib_clipad import ClipAdSdp
from anomalib_clipad.components import DefectName, PromptEnsemble, region_weights
from anomalib_clipad.errors import InputError
from anomalib_clipad.sdp import ClipAdSdpModel
from anomalib_clipad.sdp_plus import ClipAdSdpPlusModel

from .conftest import LAYOUT, build_model, folder, make_clip, new_engine, save_clip, weights

WORDS = ["scratch", "missing part", "dent"]
TEMPLATES = PromptEnsemble.from_config("industrial").templates
PATCH = 8  # pixels


def direction(clip: open_clip.CLIP, name: str, word: str) -> torch.Tensor:
    """Of a word, from the whole text tower."""
    tokenizer, ends = open_clip.get_tokenizer("ViT-B-32"), []
    for joint in ("with", "without"):
        sentences = [template.replace("{}", f"{name} {joint} {word}") for template in TEMPLATES]
        with torch.no_grad():
            ends.append(F.normalize(F.normalize(clip.encode_text(tokenizer(sentences)), dim=-1).mean(dim=0), dim=0))
    return ends[0] - ends[1]


def patch_tokens(model: ClipAdSdpModel, image: torch.Tensor) -> torch.Tensor:
    """(N, D) of the surgery path, mean over the taps."""
    taps = model.visual(image[None]).surgery
    return torch.stack([F.normalize(tap[0, 1:], dim=-1) for tap in taps]).mean(dim=0).detach()


def region_value(tokens: torch.Tensor, pixels: torch.Tensor, towards: torch.Tensor) -> float:
    """m_s of a view of 32 x 32 pixels, patch by patch."""
    total = weight = 0.0
    for number, token in enumerate(tokens):
        row, column = divmod(number, pixels.shape[1] // PATCH)
        share = float(pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH].mean())
        total, weight = total + share * float(token @ towards), weight + share
    return total / weight


def named(model: ClipAdSdpModel, images: torch.Tensor, pixels: torch.Tensor, **index: torch.Tensor) -> list[DefectName]:
    evidence = model.scores(images, **index).defect_evidence
    assert evidence is not None
    return model.name_defects(evidence, pixels, **index)


def assert_close(found: DefectName, values: list[float]) -> None:
    wanted = dict(zip(WORDS, torch.tensor(values).mul(100).softmax(dim=0).tolist(), strict=True))
    assert found.probabilities == pytest.approx(wanted, abs=1e-4)
    assert list(found.probabilities) == sorted(wanted, key=lambda word: -wanted[word])


@pytest.mark.parametrize("references", [0, 3])
def test_probabilities_follow_the_equations(references: int) -> None:
    clip = make_clip(seed=5)  # on the normal images some words are above 0, and one is not
    model = ClipAdSdpModel(clip=clip, class_names=["nut"], defects=WORDS, rvs="mean")
    images, pixels = torch.randn(2, 3, 32, 32), torch.rand(2, 32, 32)
    pixels[0, :, 20:] = 0
    directions = [direction(clip, "nut", word) for word in WORDS]
    values = [
        [region_value(patch_tokens(model, image), part, towards) for towards in directions]
        for image, part in zip(images, pixels, strict=True)
    ]
    if references:
        normal = torch.randn(references, 3, 32, 32)
        model.set_references([normal])
        of_patches = torch.cat([patch_tokens(model, image) for image in normal]) @ torch.stack(directions).T
        shown = [max(0.0, float(value)) for value in of_patches.mean(dim=0)]
        assert 0 in shown
        assert max(shown) > 0.001
        values = [[value - zero for value, zero in zip(row, shown, strict=True)] for row in values]
    for found, row in zip(named(model, images, pixels), values, strict=True):
        assert_close(found, row)


def test_tiles_count_twice_beside_the_whole_picture() -> None:
    clip = make_clip()
    model = ClipAdSdpModel(clip=clip, class_names=["nut"], defects=WORDS, rvs="mean", image_size=(32, 56), tile_size=32)
    image, pixels = torch.randn(1, 3, 32, 56), torch.rand(1, 32, 56)
    (whole,) = model.tiling.whole(image)
    lefts = model.tiling.positions[1]
    assert lefts == [0, 24]
    tiles = torch.cat([image[0, :, :, left : left + 32] for left in lefts], dim=1)  # one above the other
    over = torch.cat([pixels[0, :, left : left + 32] for left in lefts])
    values = []
    for word in WORDS:
        towards = direction(clip, "nut", word)
        tokens = torch.cat([patch_tokens(model, tile) for tile in tiles.unflatten(1, (2, 32)).transpose(0, 1)])
        of_tiles = region_value(tokens, over, towards)
        cells = F.adaptive_avg_pool2d(pixels, (4, 4))[0].repeat_interleave(8, 0).repeat_interleave(8, 1)
        values.append(region_value(patch_tokens(model, whole), cells, towards) / 3 + 2 * of_tiles / 3)
    assert_close(named(model, image, pixels)[0], values)


def test_words_of_cut_pictures_do_not_depend_on_the_batch() -> None:
    size = {"image_size": (32, 56), "tile_size": 32}
    model = ClipAdSdpModel(clip=make_clip(), class_names=["nut"], defects=WORDS, rvs="mean", **size)
    images, pixels = torch.randn(2, 3, 32, 56), torch.rand(2, 32, 56)
    together = named(model, images, pixels)
    for number in range(2):
        (alone,) = named(model, images[number : number + 1], pixels[number : number + 1])
        assert together[number].probabilities == pytest.approx(alone.probabilities, abs=1e-4)


@pytest.mark.parametrize("network", [ClipAdSdpModel, ClipAdSdpPlusModel])
def test_words_change_no_figure(network: type[ClipAdSdpModel]) -> None:
    images, clip = torch.randn(3, 3, 32, 32), make_clip()
    torch.manual_seed(1)
    without = network(clip=clip, class_names=["nut"], rvs="mean")
    torch.manual_seed(1)
    with_words = network(clip=clip, class_names=["nut"], rvs="mean", defects=WORDS)
    torch.testing.assert_close(with_words(images), without(images), atol=0, rtol=0)
    assert without.scores(images).defect_evidence is None


def test_images_of_several_classes_get_their_own_words() -> None:
    defects = {"nut": WORDS, "cloth": ["hole", "stain"]}
    model = ClipAdSdpModel(clip=make_clip(), class_names=["nut", "cloth"], defects=defects, rvs="mean")
    images, pixels = torch.randn(3, 3, 32, 32), torch.rand(3, 32, 32)
    together = named(model, images, pixels, class_index=torch.tensor([0, 1, 0]))
    assert [len(found.probabilities) for found in together] == [3, 2, 3]
    for number, name in enumerate(["nut", "cloth", "nut"]):
        model.set_classes([name])
        alone = named(model, images[number : number + 1], pixels[number : number + 1])[0]
        assert alone.probabilities == pytest.approx(together[number].probabilities, abs=1e-5)


def test_the_region_is_the_mask_or_the_largest_hundredth_of_the_map() -> None:
    maps = torch.arange(400.0).reshape(1, 20, 20).repeat(2, 1, 1) / 400
    mask = torch.zeros(2, 20, 20, dtype=torch.bool)
    mask[0, 3, 4] = True
    marked, largest = region_weights(maps, mask)
    assert marked.nonzero().tolist() == [[3, 4]]
    assert largest.nonzero().tolist() == [[19, column] for column in range(16, 20)]
    assert torch.equal(largest[largest > 0], maps[0, 19, 16:])
    assert region_weights(torch.zeros(1, 4, 4)).min() > 0  # a score without a place: the whole image


def test_no_word_is_given_where_none_leads() -> None:
    assert DefectName({"scratch": 0.40, "dent": 0.36, "hole": 0.24}).explanation == "unspecified"
    assert DefectName({"scratch": 0.50, "dent": 0.30, "hole": 0.20}).explanation == "scratch 0.50, dent 0.30"
    model = ClipAdSdpModel(clip=make_clip(), class_names=["nut"], defects=WORDS, rvs="mean")
    assert named(model, torch.full((1, 3, 32, 32), torch.nan), torch.rand(1, 32, 32))[0].explanation == "unspecified"


def explanations(root: Path) -> dict[str, tuple[str, str]]:
    """Label and explanation of every image of the one run below a folder."""
    (table,) = root.rglob("v0/predictions.csv")
    with table.open(newline="") as file:
        return {row["path"]: (row["label"], row["explanation"]) for row in csv.DictReader(file)}


def test_the_command_explains_anomalous_images(
    anomalib: Callable[..., CompletedProcess], small_clip: str, category: Path, tmp_path: Path
) -> None:
    model = ["--model", "ClipAdSdp", "--model.backbone", small_clip, "--model.defects", "[scratch, big dent]"]
    layout = [part for key, value in LAYOUT.items() for part in (f"--data.{key}", value)]
    data = ["--data", "Folder", "--data.name", "widget", "--data.root", category, *layout]
    run = anomalib("test", *model, *data, "--data.num_workers", 0, "--data.val_split_mode", "same_as_test")
    assert run.returncode == 0, run.stderr
    found = explanations(tmp_path / "results")
    assert {label for label, _ in found.values()} == {"normal", "anomalous"}
    for label, words in found.values():
        assert bool(words) == (label == "anomalous")
        assert words in ("", "unspecified") or {"scratch", "big dent"} == {part[:-5] for part in words.split(", ")}


@pytest.mark.parametrize("written", ["true", "{nut: [big dent, hole]}"])
def test_the_command_takes_states_and_mappings(
    anomalib: Callable[..., CompletedProcess], small_clip: str, image_folder: Path, tmp_path: Path, written: str
) -> None:
    model = ["--model", "ClipAdSdp", "--model.backbone", small_clip, "--model.class_name", "nut"]
    run = anomalib("predict", *model, "--model.defects", written, "--data", image_folder)
    assert run.returncode == 0, run.stderr
    known = {"unspecified", *(("scratch", "crack", "contamination") if written == "true" else ("big dent", "hole"))}
    for label, words in explanations(tmp_path / "results").values():
        assert label == "normal" or known & {part.rstrip(" .0123456789") for part in words.split(", ")}


@pytest.mark.parametrize("name", ["ClipAdSdp", "ClipAdSdpPlus"])
def test_words_survive_the_single_pass_and_a_checkpoint(
    name: str, small_clip: str, parts: Path, tmp_path: Path
) -> None:
    found = []
    for run, single_pass in (("once", True), ("twice", False)):
        (tmp_path / run).mkdir()
        arguments = {"defects": WORDS, "k_shot": 2, "single_pass": single_pass, "visualizer": False}
        model = build_model(name, small_clip, tmp_path / run, **arguments)
        engine = new_engine(tmp_path / run)
        engine.test(model, datamodule=folder(parts), verbose=False)
        found.append(explanations(tmp_path / run))
        assert model.served == (11 if single_pass else 0)
    assert found[0] == found[1]
    assert any(words for _, words in found[0].values())
    (tmp_path / "later").mkdir()
    later = build_model(name, small_clip, tmp_path / "later", k_shot=2, visualizer=False)  # no words of its own
    new_engine(tmp_path / "later").predict(
        later, data_path=parts / "test", ckpt_path=weights(engine, "model.ckpt"), return_predictions=False
    )
    assert explanations(tmp_path / "later") == found[0]


def test_a_test_says_how_often_the_words_were_right(
    small_clip: str, category: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = ClipAdSdp("nut", small_clip, defects=["square", "big dent"], visualizer=False)
    new_engine(tmp_path).test(model, datamodule=folder(category), verbose=False)
    squares = [words for path, (_, words) in explanations(tmp_path).items() if "test/square" in path]
    right = sum(words.startswith("square") for words in squares)
    f1 = 2 * right / (right + len(squares))  # precision is 1: the folder is the only truth
    assert len(squares) == 6
    share = f"accuracy {100 * right / 6:.1f} % (chance 50.0 %, most frequent 100.0 %), macro F1 {100 * f1:.1f} %"
    assert f"Attribution, not diagnosis: 6 anomalous images named: {share}." in caplog.messages


def test_what_normal_images_say_returns_with_the_class(small_clip: str, parts: Path, tmp_path: Path) -> None:
    model = ClipAdSdp("nut", small_clip, defects=WORDS, false_alarm_rate=0.2, visualizer=False)
    new_engine(tmp_path).validate(model, datamodule=folder(parts), verbose=False)
    baseline = model.model.defect_names.baseline
    before = baseline.mean
    assert len(before) == len(WORDS)
    model.choose_class("bolt")
    assert not len(baseline.mean)
    model.choose_class("nut")
    assert torch.equal(baseline.mean, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["model._extra_state"].update(defects=[["scratch", "dent"]]),
        lambda state: state["model._extra_state"].update(defects=[["scratch", "dent", 3]]),
        lambda state: state["model._extra_state"].update(defects=3),
        lambda state: state.update({"model.defect_names.baseline.mean": torch.zeros(2)}),
    ],
)
def test_a_checkpoint_with_damaged_words_is_refused(
    small_clip: str, category: Path, tmp_path: Path, change: Callable[[dict], None]
) -> None:
    model, engine = ClipAdSdp("nut", small_clip, defects=WORDS, visualizer=False), new_engine(tmp_path)
    engine.validate(model, datamodule=folder(category), verbose=False)
    path = tmp_path / "model.ckpt"
    engine.trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match="text vectors of other defects than"):
        new_engine(tmp_path).test(ClipAdSdp("nut", small_clip), datamodule=folder(category), ckpt_path=path)


def test_an_argument_comes_before_the_words_of_a_checkpoint(small_clip: str) -> None:
    model = ClipAdSdp("nut", small_clip, defects=WORDS)
    model.choose_class("nut")
    other = ClipAdSdp("nut", small_clip, defects=["hole", "stain"])
    other.load_state_dict(model.state_dict())
    assert other.model.defect_names.words == (tuple(WORDS),)
    other.restored = True
    other.choose_class("nut")
    assert other.model.defect_names.words == (("hole", "stain"),)
    assert len(other.model.defect_names.directions) == 2


def test_vectors_of_words_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANOMALIB_CLIPAD_CACHE", str(tmp_path / "cache"))
    backbone = str(save_clip(tmp_path / "clip"))
    first, again = (ClipAdSdpModel(backbone, class_names=["nut"], defects=WORDS) for _ in range(2))
    assert torch.equal(first.defect_names.directions, again.defect_names.directions)
    assert again.text_encoder.clip.token_embedding.weight.is_meta  # never read


def test_other_words_forget_what_was_measured_for_those_of_a_checkpoint(small_clip: str) -> None:
    model = ClipAdSdp("nut", small_clip, defects=WORDS)
    model.choose_class("nut")
    model.model.defect_names.baseline.fit(torch.rand(2, 1, 16, len(WORDS)))
    other = ClipAdSdp("nut", small_clip, defects=["hole", "stain", "rust"])
    other.load_state_dict(model.state_dict())
    assert len(other.model.defect_names.baseline.mean) == len(WORDS)
    other.restored = True
    other.choose_class("nut")
    assert other.model.defect_names.words == (("hole", "stain", "rust"),)
    assert not len(other.model.defect_names.baseline.mean)
