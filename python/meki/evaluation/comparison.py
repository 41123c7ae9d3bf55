"""How far a model's predictions are from a reference's, over a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from ..engine import Engine
from .perplexity import HeldOut
from .scorer import Scorer


@dataclass(frozen=True)
class Comparison:
    """Means over the tokens of a text, each of which both models predict from all before it in its window."""

    perplexity: float
    reference_perplexity: float
    kl_divergence: float
    """Of the model from the reference, in nats: sum over the vocabulary of p_reference * ln(p_reference / p_model)."""
    kl_standard_error: float
    """Of that mean, as of tokens that are independent of each other."""
    same_top_token: float
    """Share of the tokens for which both have the same most probable one."""


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is told once, at the end
def compare(
    reference: Engine, model: Engine, held_out: HeldOut, context: int, progress: Callable[[int, int], object]
) -> Comparison:
    """Both engines' predictions of at least two tokens. context: the size of the windows; progress: called with
    (tokens done, in all). Models of one vocabulary. RuntimeError if a figure is not finite."""
    expected, got = Scorer(reference, context), Scorer(model, context)
    pieces: list[NDArray[np.float64]] = []
    done = 0
    for token_ids, start in held_out.windows:
        # By map, nothing keeps the logits of a piece while those of the next are computed.
        for piece in map(_figures, expected.logits(token_ids, start), got.logits(token_ids, start)):
            pieces.append(piece)
            done += len(piece)
            progress(done, held_out.tokens)
    kl, reference_nats, nats, same = np.concatenate(pieces).T
    found = Comparison(
        perplexity=float(np.exp(nats.mean())),
        reference_perplexity=float(np.exp(reference_nats.mean())),
        kl_divergence=float(kl.mean()),
        kl_standard_error=float(kl.std(ddof=1)) / math.sqrt(len(kl)),
        same_top_token=float(same.mean()),
    )
    for name, figure in asdict(found).items():
        if not math.isfinite(figure):
            raise RuntimeError(f"{model.path}: {name} is {figure}, expected a finite number; convert the model again")
    return found


Piece = tuple[NDArray[np.float32], NDArray[np.integer]]
"""As `Scorer.logits` gives them."""


def _figures(reference: Piece, model: Piece) -> NDArray[np.float64]:
    """[n, 4]: of each token its KL divergence, -ln p of it by the reference and by the model, and whether both have the
    same most probable token. One token at a time: a vocabulary in float64 takes a megabyte."""
    return np.array([_figures_of(*both) for both in zip(reference[0], model[0], model[1], strict=True)])


def _figures_of(reference: NDArray[np.float32], model: NDArray[np.float32], token: int) -> tuple[float, ...]:
    p, q = _log_softmax(reference), _log_softmax(model)
    kl = (np.exp(p) * (p - q)).sum()  # no `@`: BLAS has threads of its own, which would get in the way of the engines'
    return kl, -p[token], -q[token], p.argmax() == q.argmax()


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    return shifted - np.log(np.exp(shifted).sum())
