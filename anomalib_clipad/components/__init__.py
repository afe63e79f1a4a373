"""What both models are made of: text side, image side, and where they meet."""

from anomalib_clipad.components.backbone import Backbone, OpenedBackbone, load_backbone, open_backbone
from anomalib_clipad.components.class_choice import ClassChoice
from anomalib_clipad.components.class_text_features import ClassTextFeatures
from anomalib_clipad.components.clip import fingerprint
from anomalib_clipad.components.conformal import ConformalThreshold, conformal_threshold, p_values
from anomalib_clipad.components.defect_names import DefectName, DefectNames, region_weights
from anomalib_clipad.components.dual_path import DualPathFeatures, DualPathVisionTransformer
from anomalib_clipad.components.float32 import Float32Buffers
from anomalib_clipad.components.image_size import keep_shape
from anomalib_clipad.components.map_offset import MapOffset
from anomalib_clipad.components.naming_figures import NamingFigures
from anomalib_clipad.components.prompts import PromptEnsemble
from anomalib_clipad.components.reference import ReferenceBank
from anomalib_clipad.components.reference_fusion import ReferenceFusion
from anomalib_clipad.components.region import Region, RegionOfPictures
from anomalib_clipad.components.representative_vector import select_representative_vector
from anomalib_clipad.components.scores import MapScale, Prediction, ScoreFusion, Scores, text_score
from anomalib_clipad.components.smoothing import GaussianSmoothing
from anomalib_clipad.components.surgery import feature_surgery
from anomalib_clipad.components.text_encoder import TextEncoder
from anomalib_clipad.components.tiling import Tiling

__all__ = [
    "Backbone",
    "ClassChoice",
    "ClassTextFeatures",
    "ConformalThreshold",
    "DefectName",
    "DefectNames",
    "DualPathFeatures",
    "DualPathVisionTransformer",
    "Float32Buffers",
    "GaussianSmoothing",
    "MapOffset",
    "MapScale",
    "NamingFigures",
    "OpenedBackbone",
    "Prediction",
    "PromptEnsemble",
    "ReferenceBank",
    "ReferenceFusion",
    "Region",
    "RegionOfPictures",
    "ScoreFusion",
    "Scores",
    "TextEncoder",
    "Tiling",
    "conformal_threshold",
    "feature_surgery",
    "fingerprint",
    "keep_shape",
    "load_backbone",
    "open_backbone",
    "p_values",
    "region_weights",
    "select_representative_vector",
    "text_score",
]
