"""SDP in anomalib's engine and command line."""

from pathlib import Path
from typing import Any

from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from torch import nn

from anomalib_clipad.components.reference import MOST_PATCHES
from anomalib_clipad.engine.arguments import plain
from anomalib_clipad.engine.module import ZeroShotMixin
from anomalib_clipad.sdp.torch_model import ClipAdSdpModel


class ClipAdSdp(ZeroShotMixin, AnomalibModule):  # type: ignore[misc]  # anomalib renames to_onnx's argument
    """CLIP-AD's SDP: zero-shot anomaly detection and localisation from a class name (arXiv 2311.00453).

    Needs no training and no normal images. Prompts describe the object normal and broken, a staged dual path through
    CLIP's vision tower compares every patch with both. The defaults are the paper's for MVTec-AD.

    Args:
        class_name: What the images show, such as "metal nut". By default the data module's category, else its name,
            else "object". Of several products a list, such as [bottle, metal nut], from which the class of each image
            is chosen, or a mapping from folder, or pattern of the path, to class. Thresholds belong to a class.
        backbone: CLIP architecture: a name that open_clip knows, hf-hub:ORG/NAME, or a folder with an
            open_clip_config.json; or demo, a small one in this package, to try things out with.
        pretrained: Weights of the backbone: open_clip's tag, or a local file (.pt, .bin, .safetensors). None means
            random weights, unless the backbone is a folder or on a hub, which bring their own.
        layers: Blocks of the vision tower to look at, counted from 1. By default the ends of the tower's four stages:
            3, 6, 9 and 12 of 12.
        rvs: How one text vector is chosen from many prompts: mean, pca, kde, dbscan or mean_shift, or a mapping of
            method and its options, such as {method: dbscan, eps: 1.5, min_samples: 25} for VisA.
        prompts: Prompt ensemble: industrial (the paper's), medical (ours), the path of a YAML file, or a mapping with
            normal_states, anomalous_states and templates.
        image_size: Side of the input in pixels, or height and width; multiples of the patch size. By default the
            backbone's own; others by interpolated position embeddings. auto keeps the shape of the pictures at about
            the backbone's own number of patches, from the first one of a class; auto:2.5 is the shape of pictures that
            are 2.5 times as wide as high.
        sigma: Standard deviation, in pixels, of the smoothing of the anomaly map. By default 8 at 240 x 240 pixels, and
            in proportion to the square root of the area at other sizes.
        tile_size: Side in pixels, or height and width, of tiles that pictures of image_size are cut into, so that small
            defects of large pictures are found; the backbone's own size is the sensible one. None for no tiles. Beside
            the tiles, the whole picture is looked at in the size of a tile.
        tile_overlap: Share of a tile that the next one covers, too, at least; 0 to 0.9.
        tile_batch_size: Most tiles that go through the backbone at once, which bounds the memory.
        region: What of the pictures is looked at: the path of a mask picture of their shape, whose white counts, or
            boxes [[left, top, right, bottom], ...] in fractions of width and height. Outside of it the map is 0. Maps,
            scores, thresholds and metrics are those of pictures whose outside is made of the nearest pixels inside; a
            picture whose marked defect is outside counts as normal. None for everything.
        k_shot: Number of normal images to compare with, drawn by the seed from the data's training split or from
            few_shot_source. With 0, none, or all of few_shot_source where it is given.
        few_shot_source: Folder of normal images to compare with.
        augment_references: Compare with the flipped and turned normal images, too.
        reference_layers: Some of layers, at which images are compared with normal ones; by default all, or those that
            suit the weights: block 3 of the demonstration backbone.
        max_references: Most patches of normal images to compare with at a tap; of more, a coreset is chosen.
        false_alarm_rate: Share of normal images that may be called anomalous, such as 0.05. The thresholds are then set
            from the scores of normal images alone: those of the training split, of few_shot_source and of the
            validation data.
        defects: Words for what is found, two or more, such as [scratch, dent]; the likeliest two get into the
            explanation of each anomalous image. Or a mapping from class to words, or states for the prompts' own words.
            Attribution, not diagnosis. None for no words.
        output_size: original, for maps and masks of predict in each picture's own size and shape, in batches and in the
            folders heatmaps and masks of the run; see :class:`anomalib_clipad.engine.original_size.OriginalMaps`. None
            for those of image_size. Labels and scores are the same.
        single_pass: Whether the scores of the validation pass serve the test pass where both read the same images; the
            figures are the same, in half the time.
        extra_outputs: Whether exported ONNX and OpenVINO files give the p-value and the words' probabilities, too.
            anomalib's OpenVINOInferencer takes no file with more than its four outputs.
        page: Whether to write ``report.html``, a page to look through the images.
        pre_processor: Pre-processor, or whether to use the default: bicubic resize and CLIP's normalisation.
        post_processor: Post-processor, or whether to use the default: scores and maps in [0, 1], labels and masks.
        evaluator: Evaluator, or whether to use the default: AUROC, F1Max, AP of images and pixels, AUPRO, F1Score.
        visualizer: Visualizer, or whether to draw pictures.

    Raises:
        InputError: If an argument cannot be used; weights that cannot be had are named with the ways out.

    Example:
        >>> from anomalib.engine import Engine
        >>> model = ClipAdSdp(class_name="metal nut", backbone=small_clip)
        >>> predictions = Engine(logger=False, enable_progress_bar=False).predict(model, data_path=image_folder)
        >>> predictions[0].anomaly_map.shape
        torch.Size([1, 32, 32])
    """

    def __init__(
        self,
        class_name: str | list[str] | dict[str, str] | None = None,
        backbone: str = "ViT-B-16-plus-240",
        pretrained: str | None = "laion400m_e31",
        layers: list[int] | None = None,
        rvs: str | dict[str, Any] = "dbscan",
        prompts: str | dict[str, Any] = "industrial",
        image_size: int | tuple[int, int] | str | None = None,
        sigma: float | None = None,
        tile_size: int | tuple[int, int] | None = None,
        tile_overlap: float = 0.25,
        tile_batch_size: int = 8,
        region: list[list[float]] | list[float] | str | Path | None = None,
        k_shot: int = 0,
        few_shot_source: str | Path | None = None,
        augment_references: bool = False,
        reference_layers: list[int] | None = None,
        max_references: int = MOST_PATCHES,
        false_alarm_rate: float | None = None,
        defects: list[str] | dict[str, Any] | bool | str | None = None,
        output_size: str | None = None,
        single_pass: bool = True,
        extra_outputs: bool = False,
        page: bool = True,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Here and not later, since these variables become the hyperparameters.
        class_name, layers, rvs, prompts, image_size = map(plain, (class_name, layers, rvs, prompts, image_size))
        tile_size, region, reference_layers, defects = map(plain, (tile_size, region, reference_layers, defects))
        model = ClipAdSdpModel(
            backbone=backbone,
            pretrained=pretrained,
            layers=layers,
            rvs=rvs,
            prompts=prompts,
            image_size=image_size,
            sigma=sigma,
            tile_size=tile_size,
            tile_overlap=tile_overlap,
            tile_batch_size=tile_batch_size,
            region=region,
            reference_layers=reference_layers,
            max_references=max_references,
            defects=defects,
        )
        super().__init__(*self.components_for(model, pre_processor, post_processor), evaluator, visualizer)
        self.adopt(model, class_name, k_shot, few_shot_source, false_alarm_rate, augment_references, single_pass, page)
        self.adopt_extra_outputs(extra_outputs)
        self.adopt_output_size(output_size)
