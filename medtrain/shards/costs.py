"""Seconds of a row, estimated from what finished shards took.

receipts of an earlier stage → seconds for a prompt token, an answer token and a row, by
non-negative least squares → weights by which a later stage's batches are dealt out to shards. The
fit is pulled towards a prior shape: shards are cut to equal cost, so that their measurements differ
little, and one shard alone tells the scale and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from medtrain.errors import DataError
from medtrain.files import read_sealed
from medtrain.shards.plan import Request
from medtrain.shards.shard_files import shards_root

_FEATURES = ("prompt_tokens", "tokens", "rows")
_PRIOR = (0.05, 1.0, 1.0)
"""In answer tokens: a prompt is read many tokens at a time, and a row has a fixed cost."""
_PULL = 1e-3
"""Squared error of the mean shard, as a share of its seconds, that doubling a prior term costs."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of a row, by its tokens."""

    prompt_token_s: float
    answer_token_s: float
    row_s: float
    answer_share: float = 1.0
    """Tokens of an answer, as a share of its budget."""

    def seconds(self, request: Request) -> float:
        """Estimated seconds of one row."""
        answer_tokens = self.answer_share * request.max_answer_tokens
        return (
            self.row_s
            + self.prompt_token_s * request.prompt_tokens
            + self.answer_token_s * answer_tokens
        )

    def weights(self, requests: Sequence[Request]) -> list[float] | None:
        """Estimated seconds of each row; None where the rows do not tell their tokens."""
        if any(request.prompt_tokens or request.max_answer_tokens for request in requests):
            return [self.seconds(request) for request in requests]
        return None


def measured_costs(directory: Path) -> CostModel | None:
    """The model fitted to a stage's finished shards; None where none has finished."""
    return fit_costs(_receipts(directory))


def fit_costs(receipts: Iterable[Mapping[str, Any]]) -> CostModel | None:
    """Fit seconds to what receipts say was computed in them; None without a usable receipt.

    Minimises the squared error, relative to the mean shard, plus a pull towards the prior, over
    non-negative terms. Three terms have seven sets of which the others are zero: all are tried
    (Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23, has the conditions).
    """
    used = [r for r in receipts if r.get("seconds", 0) > 0 and r.get("computed", {}).get("rows")]
    if not used:
        return None
    seconds = [float(receipt["seconds"]) for receipt in used]
    sums = [[float(receipt["computed"][name]) for name in _FEATURES] for receipt in used]
    # In units of the prior's prediction every term is about 1, and so is every measurement.
    scale = sum(seconds) / sum(_dot(_PRIOR, row) for row in sums)
    mean = sum(seconds) / len(seconds)
    x = [[p * scale * v / mean for p, v in zip(_PRIOR, row, strict=True)] for row in sums]
    terms = _non_negative_fit(x, [s / mean for s in seconds])
    prompt, answer, row = (t * p * scale for t, p in zip(terms, _PRIOR, strict=True))
    budget = sum(receipt["computed"]["max_answer_tokens"] for receipt in used)
    share = sum(row[1] for row in sums) / budget if budget else 1.0
    return CostModel(prompt, answer, row, min(1.0, share) or 1.0)


def _non_negative_fit(x: Sequence[Sequence[float]], y: Sequence[float]) -> list[float]:
    """The terms t ≥ 0 that minimise |x t - y|² + _PULL |t - 1|²."""
    size = len(x[0])
    gram = [[_dot(_column(x, i), _column(x, j)) for j in range(size)] for i in range(size)]
    for i in range(size):
        gram[i][i] += _PULL
    right = [_dot(_column(x, i), y) + _PULL for i in range(size)]
    best, least = [0.0] * size, 0.0
    for count in range(1, size + 1):
        for active in combinations(range(size), count):
            solved = _solve(
                [[gram[i][j] for j in active] for i in active], [right[i] for i in active]
            )
            terms = [0.0] * size
            for i, value in zip(active, solved, strict=True):
                terms[i] = value
            # The objective, up to a constant, for terms that solve their normal equations.
            objective = -_dot(terms, right)
            if min(terms) >= 0 and objective < least:
                best, least = terms, objective
    return best


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination; the matrix is positive definite, so that no pivot vanishes."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i, pivot in enumerate(rows):
        for j, row in enumerate(rows):
            if j != i:
                factor = row[i] / pivot[i]
                rows[j] = [a - factor * b for a, b in zip(row, pivot, strict=True)]
    return [row[-1] / row[i] for i, row in enumerate(rows)]


def _column(x: Sequence[Sequence[float]], i: int) -> list[float]:
    return [row[i] for row in x]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


def _receipts(directory: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(shards_root(directory).glob("*/done.json")):
        try:
            yield read_sealed(path)
        except (FileNotFoundError, DataError):
            continue
