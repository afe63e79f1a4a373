"""Export to files that are whole or not there at all, with everything but the text tower baked in."""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.models.components.base.export_mixin import ExportMixin

from anomalib_clipad.engine.quantization import OneByOne, quantize_tower
from anomalib_clipad.errors import InputError
from anomalib_clipad.files import remove_abandoned

if TYPE_CHECKING:
    from openvino import Model

logger = logging.getLogger(__name__)

OPSET = 18  # the oldest that torch's exporter writes itself; anomalib's 14 is tried, fails loudly and is given up
ONNX_PACKAGES = ("onnx", "onnxscript")
TALKATIVE = ("onnxscript", "onnx_ir")  # a thousand lines an export
OF_RUNS = ("table", "page", "original_maps", "_statistics", "_normal_key")
LARGEST_ONNX = 1536 * 2**20  # bytes of weights in one file, as torch's exporter has it, whatever it is told
DRAFT = ".export-"
ROOM = 1 << 20  # bytes free on a disk that is not the reason why a file could not be written
WRITERS = ("inline_container", "iostream error")  # how torch and OpenVINO word that they could not write


class WholeExportMixin(ExportMixin):
    """anomalib's three exports, for a model that has text vectors to bake in.

    Files are written beside their place and moved there when they are complete. A model that cannot be used yet, a
    package that is missing and a folder that cannot be written to are named in a sentence.
    """

    _tells = "name"  # what forward tells of the class that it chose, where there are several

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        self._tells = what
        try:
            yield
        finally:
            self._tells = WholeExportMixin._tells

    def prepare_export(self, datamodule: AnomalibDataModule | None = None) -> None:
        """Have ready what is baked in, or say why it cannot be; for the models to fill."""
        raise NotImplementedError

    def tracing(self) -> AbstractContextManager[None]:
        """Around the tracing of a model; for the models to fill."""
        return nullcontext()

    def describe(self, file: Path) -> None:
        """Write into an ONNX file what belongs to it beside the graph; for the models to fill."""

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Write a file for :class:`anomalib.deploy.TorchInferencer`.

        Args:
            export_root: Folder for ``weights/torch/model.pt``.
            model_file_name: Another name than model.

        Returns:
            The file.

        Raises:
            InputError: If the model is untrained, or the file cannot be written.
        """
        _check_arguments(export_root, model_file_name)
        self.prepare_export()
        logger.info("Writing the file for torch.")
        network = cast("Any", self.model)
        encoder, network.text_encoder = network.text_encoder, None  # the text tower has done its work
        # What a run has left, with the names of all its images, is no part of a model.
        left = {name: getattr(self, name) for name in OF_RUNS if hasattr(self, name)}
        for name, value in left.items():
            setattr(self, name, {} if isinstance(value, dict) else None)
        try:
            return _write(export_root, lambda folder: super(WholeExportMixin, self).to_torch(folder, model_file_name))
        finally:
            network.text_encoder = encoder
            for name, value in left.items():
                setattr(self, name, value)

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,  # noqa: ANN401 - as anomalib has it
    ) -> Path:
        """Write an ONNX file: images in [0, 1] in; pred_score, pred_label, anomaly_map, pred_mask out.

        Of several classes the file chooses each image's, and has a fifth output, class_index, that counts them as
        ``class_name`` does. With ``extra_outputs`` the file has those of
        :mod:`anomalib_clipad.engine.extra_outputs`, too.

        Args:
            export_root: Folder for ``weights/onnx/model.onnx``, one file. A model with 1.5 GiB of weights or more has
                them beside it, in ``model.onnx.data``, because ONNX has no larger files; it needs both.
            model_file_name: Another name than model.
            input_size: Height and width of the images, where all have the same. By default any: they are resized as
                the engine does it, within the model. The number of images is free in either case.
            **kwargs: See :func:`torch.onnx.export`.

        Returns:
            The file.

        Raises:
            InputError: If the model is untrained, a package is missing, or the file cannot be written.
        """
        _check_arguments(export_root, model_file_name, input_size)
        _check_packages("onnx", *ONNX_PACKAGES)
        self.prepare_export()
        logger.info("Tracing the model for ONNX, which takes up to a minute or two.")
        kwargs.setdefault("opset_version", OPSET)
        kwargs.setdefault("verbose", False)
        network = cast("Any", self.model)
        kept = [*network.visual.state_dict().values(), network.references.bank, network.tile_references.bank]
        size = sum(value.numel() * value.element_size() for value in kept)
        kwargs.setdefault("external_data", size >= LARGEST_ONNX)
        export = super().to_onnx

        def traced(folder: Path) -> Path:
            file = export(folder, model_file_name, input_size, **kwargs)
            self.describe(file)
            return file

        tells = "index" if self._tells == "name" else self._tells
        with _warnings_only(*TALKATIVE), self.tracing(), self._telling(tells):
            return _write(export_root, traced)

    def to_openvino(  # type: ignore[override]  # anomalib names the rest one by one
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        class_output: bool = False,
        **kwargs: Any,  # noqa: ANN401 - handed on to anomalib
    ) -> Path:
        """Write OpenVINO's pair of files; inputs and outputs are those of :meth:`to_onnx`.

        They are the four that anomalib's ``OpenVINOInferencer`` takes, and class_index only where it is asked for.

        Args:
            export_root: Folder for ``weights/openvino/model.xml`` and ``model.bin``.
            model_file_name: Another name than model.
            input_size: See :meth:`to_onnx`.
            compression_type: FP16 or INT8 weights, or INT8_PTQ arithmetic. The last needs input_size left at its
                default, or equal to the model's own: OpenVINO 2026.4 cannot run it otherwise.
            datamodule: Images by which INT8_PTQ chooses its ranges.
            class_output: Whether there is a fifth output, class_index, where there are several classes.
            **kwargs: See :class:`anomalib.models.components.base.export_mixin.ExportMixin`.

        Returns:
            The ``.xml`` file.

        Raises:
            InputError: If the model is untrained, a package is missing, the files cannot be written, INT8_ACQ is
                asked for, or INT8_PTQ of a model that cuts tiles.
        """
        _check_arguments(export_root, model_file_name, input_size)
        if compression_type is not None and compression_type not in list(CompressionType):
            names = ", ".join(kind.name for kind in CompressionType if kind != CompressionType.INT8_ACQ)
            msg = f"compression_type must be one of {names}, got {compression_type!r}."
            raise InputError(msg)
        if compression_type == CompressionType.INT8_ACQ:
            msg = "INT8_ACQ is not offered: NNCF fails as soon as it has to restore a part of this model; use INT8_PTQ."
            raise InputError(msg)
        if compression_type == CompressionType.INT8_PTQ and len(cast("Any", self.model).tiling):
            msg = "INT8_PTQ is not offered with tile_size: OpenVINO cannot run what comes out; use INT8 or FP16."
            raise InputError(msg)
        compressor = ["nncf"] if compression_type and compression_type != CompressionType.FP16 else []
        _check_packages("openvino", "openvino", *ONNX_PACKAGES, *compressor)
        if compression_type == CompressionType.INT8_PTQ and datamodule is None:
            msg = "INT8_PTQ chooses its ranges by images; give a datamodule, such as --data MVTecAD."
            raise InputError(msg)
        self.prepare_export(datamodule)
        logger.info("Exporting to OpenVINO by way of ONNX.")
        kwargs |= {"input_size": input_size, "compression_type": compression_type, "datamodule": datamodule}
        export = super().to_openvino
        with self._telling("index" if class_output else "nothing"):
            return _write(export_root, lambda folder: export(folder, model_file_name, **kwargs))

    def _post_training_quantization_ov(  # type: ignore[override]  # anomalib's knows no model
        self, model: "Model", datamodule: AnomalibDataModule | None = None
    ) -> "Model":
        if datamodule is None:  # refused by to_openvino
            msg = "datamodule is missing"
            raise TypeError(msg)
        datamodule.setup("fit")
        projection = cast("Any", self.model).visual.visual.proj
        return quantize_tower(model, projection, OneByOne(datamodule.val_dataloader()))


@contextmanager
def _warnings_only(*names: str) -> Iterator[None]:
    """Keep loggers from saying less than a warning."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def _check_arguments(export_root: object, model_file_name: object, input_size: object = None) -> None:
    if not isinstance(export_root, str | Path):
        msg = f"export_root must be the path of a folder, got {export_root!r}."
        raise InputError(msg)
    if not isinstance(model_file_name, str) or not model_file_name or Path(model_file_name).name != model_file_name:
        msg = f"model_file_name must be a name without folders, got {model_file_name!r}."
        raise InputError(msg)
    if input_size is not None and not (
        isinstance(input_size, list | tuple)
        and len(input_size) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in input_size)
    ):
        msg = f"input_size must be height and width in pixels, got {input_size!r}."
        raise InputError(msg)


def _check_packages(kind: str, *packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        msg = f"Export to {kind} needs {' and '.join(missing)}; pip install 'anomalib[openvino]' brings all of it."
        raise InputError(msg)


def _write(export_root: Path | str, export: Callable[[Path], Path]) -> Path:
    """Export to a folder beside the place, then move; the model's graph comes last, when its weights are there."""
    root = Path(export_root)
    draft: Path | None = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_abandoned(root, f"{DRAFT}*")
        with TemporaryDirectory(dir=root, prefix=DRAFT) as name:
            draft = Path(name)
            written = export(draft)
            place = root / written.parent.relative_to(draft)
            place.mkdir(parents=True, exist_ok=True)
            for file in sorted(written.parent.iterdir(), key=lambda file: file == written):
                file.replace(place / file.name)
            return place / written.name
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not any(mark in str(error) for mark in WRITERS):
            raise
        full = draft is not None and shutil.disk_usage(root).free < ROOM
        reason = "no space left on the device" if full else str(error).strip().splitlines()[0]
        msg = f"The export could not be written to {root} ({reason}); make room there, or choose another export_root."
        raise InputError(msg) from error
