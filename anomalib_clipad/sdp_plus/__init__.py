"""SDP+, SDP with linear layers trained once on another data set."""

# First, because its import calls ours back (see ``plugin``), which must not find this package half imported.
import anomalib.models  # noqa: F401 - for its effect

from anomalib_clipad.sdp_plus.adapter import load_adapter, save_adapter
from anomalib_clipad.sdp_plus.lightning_model import ClipAdSdpPlus
from anomalib_clipad.sdp_plus.loss import dice_loss, focal_loss
from anomalib_clipad.sdp_plus.torch_model import ClipAdSdpPlusModel

__all__ = ["ClipAdSdpPlus", "ClipAdSdpPlusModel", "dice_loss", "focal_loss", "load_adapter", "save_adapter"]
