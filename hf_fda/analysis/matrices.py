"""What every analysis asks of the vectors it looks at: that there are some, and that they are finite."""

from __future__ import annotations

from torch import Tensor

from hf_fda.errors import InputError


def as_matrix(vectors: Tensor, what: str = "the vectors", centred: bool = False) -> Tensor:
    """Vectors as the rows of one matrix in float64, on the CPU.

    Args:
        vectors: (..., d), two dimensions at least: anchors (n, T, d), hidden states (N, d).
        what: to call them in errors.
        centred: with their mean taken from each.

    Returns:
        (N, d).

    Raises:
        InputError: when there are none, they are no vectors, or an entry is not finite.
    """
    if vectors.ndim < 2:
        raise InputError(f"{what} have the shape {tuple(vectors.shape)}; give vectors as rows: (..., d)")
    if vectors.numel() == 0:
        raise InputError(f"{what} have the shape {tuple(vectors.shape)}, so there are none")
    matrix = vectors.detach().cpu().double().reshape(-1, vectors.shape[-1])
    if not bool(matrix.isfinite().all()):
        raise InputError(f"{what} are not all finite numbers; construct or record them again")
    return matrix - matrix.mean(0) if centred else matrix
