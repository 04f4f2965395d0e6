"""One step of decoding: from a batch's logits to one token a row.

logits → temperature → top-k → top-p → inverse of the cumulative distribution at the row's uniform
number. Every row is treated by itself, so its neighbours, their number and their order do not
change what is drawn from given logits. What remains is the model: matrix products over another
batch differ in their last bits, and near a boundary that can tip a draw. Therefore batches are
fixed by the shard plan and not by who computes them, or when.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medtrain.generate.sampling import Sampling

NOT_A_NUMBER = -1
"""Stands for the token of a row whose logits are not numbers."""


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """One token a row.

    Args:
        logits: (rows, vocabulary), any floating dtype; computed with in float32.
        uniform: (rows,), float64 in [0, 1); not looked at when greedy.
        sampling: temperature, top-k, top-p.

    Returns:
        (rows,) token ids, int64, on the CPU; NOT_A_NUMBER where a row has NaN or no finite logit.
    """
    # Sums are in float64, which Apple's GPUs do not have.
    logits = logits.cpu() if logits.device.type == "mps" else logits
    return choose(logits, uniform.to(logits.device), sampling).cpu()


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """`draw` that stays on the logits' device; on a GPU the host waits for nothing.

    Args:
        logits: (rows, vocabulary), any floating dtype; computed with in float32.
        uniform: (rows,), float64 in [0, 1), on the same device.
        sampling: temperature, top-k, top-p.

    Returns:
        (rows,) token ids, int64; NOT_A_NUMBER where a row has NaN or no finite logit.
    """
    logits = logits.float()
    best = logits.max(dim=-1).values  # (rows,); NaN if any logit is
    if sampling.greedy:
        tokens = _lowest_where(logits == best[:, None])
    else:
        tokens = _sample(logits, uniform, sampling)
    return torch.where(torch.isfinite(best), tokens, NOT_A_NUMBER)


def _lowest_where(mask: Tensor) -> Tensor:
    """The lowest position of a True in each row; argmax leaves open which of several it takes."""
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask, positions, mask.shape[-1]).amin(dim=-1)


def _sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    vocabulary = logits.shape[-1]
    kept = min(sampling.top_k or vocabulary, vocabulary)
    if kept == vocabulary and sampling.top_p >= 1:
        return _invert(_probabilities(logits, sampling), uniform)
    ids = most_likely(logits, kept)  # (rows, kept), most likely first
    weights = _probabilities(logits.gather(-1, ids), sampling)
    if sampling.top_p < 1:
        before = weights.cumsum(dim=-1) - weights
        # The most likely token is kept whatever rounding says of its own `before`.
        before[:, 0].zero_()
        weights = torch.where(before < sampling.top_p, weights, 0.0)
    # In the order of token ids two tokens of nearly the same probability do not swap their places
    # on the way when a last bit differs; sorted by probability they would.
    ids, order = ids.sort(dim=-1)
    return ids.gather(-1, _invert(weights.gather(-1, order), uniform)[:, None]).squeeze(-1)


def _probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    # Shifted before it is divided: a temperature near 0 must not make the largest logit infinite.
    shifted = logits.double() - logits.max(dim=-1, keepdim=True).values
    return (shifted / sampling.temperature).softmax(dim=-1)


def most_likely(logits: Tensor, count: int) -> Tensor:
    """The ids of each row's `count` largest logits, largest first, equal ones by ascending id.

    Logits in 16 bits are often equal, and which of equal values `topk` returns is left open. On a
    CPU its choice is taken where no value outside equals the smallest inside, and ordered anew. On
    a GPU that look would make the host wait, and keys that are never equal are sorted out at once.

    Args:
        logits: (rows, vocabulary), float32, no NaN.
        count: at most the vocabulary.

    Returns:
        (rows, count) int64.
    """
    if logits.device.type != "cpu":
        return largest_keys(logits, count)
    if count < logits.shape[-1]:
        values, ids = logits.topk(count, dim=-1)
        if bool(((logits >= values[:, -1:]).sum(dim=-1) == count).all()):
            return _ids(_keys(values, ids).sort(dim=-1, descending=True).values)
    return largest_keys(logits, count)


def largest_keys(logits: Tensor, count: int) -> Tensor:
    """`most_likely` by keys over the whole vocabulary: no look at a value, whatever is equal."""
    vocabulary = logits.shape[-1]
    keys = _keys(logits, torch.arange(vocabulary, device=logits.device))
    if count < vocabulary and logits.device.type != "cpu":
        return _ids(keys.topk(count, dim=-1).values)
    return _ids(keys.sort(dim=-1, descending=True).values[:, :count])


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """An int64 that sorts by descending value and, of equal ones, by ascending id.

    The bits of a float, read as an integer with the negative half turned round, sort as the float
    does; with the id in the lower half no two keys are equal, so every algorithm gives one result.

    Args:
        values: (rows, candidates), float32.
        ids: (candidates,) or (rows, candidates), int64, below 2 ** 32.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0 in its bits too
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    # One pass over the vocabulary that widens, shifts and adds.
    return torch.add(0xFFFFFFFF - ids, ordered, alpha=1 << 32)


def _ids(keys: Tensor) -> Tensor:
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first position at which the running sum exceeds `uniform` times the whole sum.

    Args:
        weights: (rows, candidates), float64, none negative, not all zero.
        uniform: (rows,), float64 in [0, 1).

    Returns:
        (rows,) int64; never a position of weight 0.
    """
    sums = weights.cumsum(dim=-1)
    target = uniform[:, None] * sums[:, -1:]
    position = torch.searchsorted(sums, target, right=True)
    # A product that rounds up to the whole sum would point behind the last candidate.
    last = (sums < sums[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(position, last).squeeze(-1)
