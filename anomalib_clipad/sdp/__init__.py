"""SDP, the model that needs no training."""

# First, because its import calls ours back (see ``plugin``), which must not find this package half imported.
import anomalib.models  # noqa: F401 - for its effect

from anomalib_clipad.sdp.lightning_model import ClipAdSdp
from anomalib_clipad.sdp.torch_model import ClipAdSdpModel

__all__ = ["ClipAdSdp", "ClipAdSdpModel"]
