"""Looking at anchors and merges: spectra, subspaces, gradients, landscapes, interference, and what each block bought.

The functions here are pure: tensors and numbers in, a frozen dataclass out, in float64. `hf_fda.analyze` applies them
to folders and draws what they find.
"""

from hf_fda.analysis.gradients import GradientAgreement, anchor_gradients, gradient_agreement, states_gradients
from hf_fda.analysis.landscapes import Landscape, axis, landscape
from hf_fda.analysis.moves import Bought, Move, move
from hf_fda.analysis.planes import Plane, Projected, plane
from hf_fda.analysis.similarities import Similarity, from_gram, gram, similarity
from hf_fda.analysis.spectra import Spectrum, Tail, effective_rank, spectrum, tail
from hf_fda.analysis.subspaces import ProjectionEnergy, projection_energy

__all__ = [
    "Bought",
    "GradientAgreement",
    "Landscape",
    "Move",
    "Plane",
    "Projected",
    "ProjectionEnergy",
    "Similarity",
    "Spectrum",
    "Tail",
    "anchor_gradients",
    "axis",
    "effective_rank",
    "from_gram",
    "gradient_agreement",
    "gram",
    "landscape",
    "move",
    "plane",
    "projection_energy",
    "similarity",
    "spectrum",
    "states_gradients",
    "tail",
]
