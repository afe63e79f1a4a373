"""The classes that images are compared with, and the text vectors of each."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from anomalib_clipad.components.class_choice import ClassChoice
from anomalib_clipad.components.defect_names import DefectNames
from anomalib_clipad.components.defect_words import Defects
from anomalib_clipad.components.float32 import Float32Buffers
from anomalib_clipad.components.prompts import PromptEnsemble
from anomalib_clipad.components.text_encoder import TextEncoder
from anomalib_clipad.errors import InputError


class ClassTextFeatures(Float32Buffers):
    """A network with two text vectors a class: normal and anomalous.

    Args:
        text_encoder: Encodes the prompts.
        embed_dim: Length D of the vectors.
        prompts: The prompts of a class.
        rvs: Method and options by which the vectors are chosen, see :meth:`TextEncoder.text_features`.
        defects: Words for what is found, see :class:`DefectNames`; none by default.

    Example:
        >>> from anomalib_clipad.components.backbone import load_backbone
        >>> clip, tokenizer, *_ = load_backbone(small_clip)
        >>> encoder = TextEncoder(clip, tokenizer)
        >>> network = ClassTextFeatures(encoder, 24, PromptEnsemble.from_config("industrial"), {"method": "mean"})
        >>> network.set_classes(["bottle", "metal nut"])
        >>> network.select_text_features(torch.tensor([0, 1, 1])).shape
        torch.Size([3, 2, 24])
    """

    growing = ("text_features",)

    image_size: tuple[int, int]
    text_features: torch.Tensor
    text_encoder: TextEncoder | None  # absent in an exported model

    def __init__(
        self,
        text_encoder: TextEncoder,
        embed_dim: int,
        prompts: PromptEnsemble,
        rvs: dict[str, Any],
        defects: Defects = None,
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.prompts = prompts
        self.rvs = rvs
        self.class_names: tuple[str, ...] = ()
        self.register_buffer("text_features", torch.empty(0, 2, embed_dim))  # normal, anomalous
        self.defect_names = DefectNames(embed_dim, defects, prompts)
        self.class_choice = ClassChoice(embed_dim)

    def set_classes(self, class_names: Sequence[str], choose: bool = False, words: bool = True) -> None:
        """Encode the prompts of these classes; forgets what was measured on images of others.

        Args:
            class_names: What can be in the images; an image's ``class_index`` counts them from 0.
            choose: Whether an image without a ``class_index`` gets the class that :class:`ClassChoice` finds, rather
                than the first one.
            words: Whether to encode the words for defects, too.

        Raises:
            InputError: If the list or a name is empty, or the model was exported, which leaves the text tower out.
        """
        if isinstance(class_names, str) or not class_names:
            msg = f"class_names must be a list of at least one name, got {class_names!r}."
            raise InputError(msg)
        if self.text_encoder is None:
            msg = f"This model was exported for {', '.join(self.class_names)}; export one for {', '.join(class_names)}."
            raise InputError(msg)
        self.defect_names.forget()
        if words:
            self.defect_names.encode(class_names, self.text_encoder)
        pairs, whole = [], []
        for name in class_names:  # both at once: they are made from the same prompts
            pairs.append(self.text_encoder.text_features(name, self.prompts, **self.rvs))
            if choose:
                whole.append(self.text_encoder.class_vector(name, self.prompts))
        self.text_features = torch.stack(pairs).to(self.text_features.device)
        self.class_names = tuple(class_names)
        self.class_choice.take(whole)
        self.forget_images()

    def forget_classes(self) -> None:
        """Have no class, and nothing that was measured on images, as at the beginning."""
        self.class_names = ()
        self.text_features = self.text_features[:0]
        self.defect_names.forget()
        self.class_choice.take([])
        self.forget_images()

    def forget_images(self) -> None:
        """Reset what was measured on images of the present classes."""
        self.defect_names.baseline.reset()

    def name_as_asked(self) -> None:
        """Encode the words of the argument where a state dict has brought others, or none."""
        wanted = self.defect_names.wanted(self.class_names)
        if wanted and wanted != self.defect_names.words and self.text_encoder is not None:
            self.defect_names.encode(self.class_names, self.text_encoder)

    def get_extra_state(self) -> dict[str, Any]:
        """What a state dict keeps beside tensors: the classes of the text vectors, words for defects, and the size."""
        words = {"defects": list(map(list, self.defect_names.words))} if self.defect_names.words else {}
        return {"class_names": list(self.class_names), **words, "image_size": list(self.image_size)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over the classes and words of a state dict."""
        self.class_names = tuple(state["class_names"])
        self.defect_names.words = tuple(map(tuple, state.get("defects", ())))

    def index_of(self, surgery: Sequence[torch.Tensor], class_index: torch.Tensor | None) -> torch.Tensor | None:
        """(B,) index of the images' classes: the given one, else the chosen one; nothing for the first class."""
        return self.class_choice(surgery) if class_index is None and self.class_choice.ready else class_index

    def select_text_features(self, class_index: torch.Tensor | None = None) -> torch.Tensor:
        """Text vectors of a batch: (B, 2, D) by class, or (2, D) of the first class for all images.

        Raises:
            InputError: If no class is set, or the index is of another type, or names a class that there is not.
        """
        if not len(self.text_features):
            msg = "No class is set, so there is nothing to compare the images with; call set_classes(['...']) first."
            raise InputError(msg)
        if class_index is None:
            return self.text_features[0]
        if class_index.ndim != 1 or class_index.is_floating_point() or class_index.is_complex():
            msg = f"class_index must hold one whole number an image, got {class_index.dtype} of {class_index.shape}."
            raise InputError(msg)
        # On a GPU the values are not looked at, which would wait for it; while exporting there are none.
        looks = class_index.device.type == "cpu" and not torch.compiler.is_compiling()
        outside = looks and ((class_index < 0) | (class_index >= len(self.text_features)))
        if outside is not False and bool(outside.any()):
            msg = f"class_index must lie in 0 to {len(self.text_features) - 1}, got {class_index.tolist()}."
            raise InputError(msg)
        return self.text_features[class_index]
