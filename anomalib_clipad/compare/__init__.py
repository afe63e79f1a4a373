"""The comparison: any models of anomalib side by side, zero-shot ones included."""

# First, because its import calls ours back (see ``plugin``), which must not find this package half imported.
import anomalib.models  # noqa: F401 - registers the models, see above

from anomalib_clipad.compare.evaluator import CompareEvaluator
from anomalib_clipad.compare.generator import CompareJobGenerator
from anomalib_clipad.compare.job import CompareJob
from anomalib_clipad.compare.pipeline import Compare
from anomalib_clipad.compare.report import write_report

__all__ = ["Compare", "CompareEvaluator", "CompareJob", "CompareJobGenerator", "write_report"]
