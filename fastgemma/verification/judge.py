"""How far a patched result may be from its reference, and whether it is.

In float32 the reference is stock itself: relative L2 error at most 1e-5 per tensor. A gradient whose terms cancel is
not known to 1e-5: stock's attention implementations, exact alike, then differ by more than that, too. Where 6 times
their difference is more (2 times for the logits, 4 times for all gradients as one vector), that is the limit. On tiny
models errors were 1 to 4 times the difference. Where they differ by more than 1e-3, it is not by rounding: under
`eager`, padding on the left predicts the first token from the mean of all values. That is no measure of anything.

In 16 bits the reference is the same model in float32, and stock's own distance from it is the measure. Over many seeds
a faithful kernel's error is at most 1.1 times stock's, and that is what fastgemma's tests ask for. One batch is one
draw of rounding noise, though: every gradient passes through the roundings of all layers, so the ratio of two equally
exact computations scatters. It did so on three seeds of the five Gemma 4 structures, tiny, in float16: with one feature
at a time, each exact to 1e-5 in float32, the error was 0.7 to 1.9 times stock's for all gradients as one vector, up to
2.7 times for a single gradient and up to 1.2 times for the logits. Stock's own attention "eager" had up to 1.3, 2.3 and
1.2 times the error of its "sdpa". Therefore

- stock's error is the larger one of these two implementations', where both fit into memory, and the other one's is no
  more than 4 times that of the one in use: else it computes something else;
- all gradients as one vector may have 2.5 times stock's error, the logits 1.5 times, a single gradient 4 times;
- the largest absolute error may be 2 times stock's for the logits and 6 times for a single gradient, plus one unit in
  the last place of the tensor's largest element;
- the loss, one number in which roundings may cancel, may be off by 1.5 times the sum of stock's error and stock's
  root-mean-square error of a logit: that is the size of one token's error.

So in 16 bits an error is found if it is larger than stock's rounding; in float32, if it is 1e-5. Where stock's own
logits or gradients are off by half of their norm or more, as with random weights of full depth, any result would pass:
then there is no verdict.

Where the float32 model does not fit, the reference is stock, and the measure is how far stock's other attention
implementation is from it: at most 2 times that for the logits, 4 times for all gradients, 6 times for a single one, 3
and 9 times for the largest differences of logits and of a gradient (patched code rounds differently in every layer, not
in its attention alone). This finds gross errors only, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from fastgemma.verification.measure import LOGITS, LOSS, Distance, Result, distance, pooled

# All gradients as one vector, in a report.
GRADIENT = "gradient"
FLOAT32_LIMIT = 1e-5
# Beyond these, stock's attention implementations differ by more than rounding: of each other in float32, and as a
# multiple of the error of the one in use.
_ALIKE, _ALIKE_FACTOR = 1e-3, 4.0
# Two results that have nothing in common are sqrt(2) of their norm apart.
_BLUNT = 0.5
# What a report says of each rule: exact in float32, against the truth, against stock.
RULES = {
    "float32": (
        "Rule: float32, patched against stock: relative L2 error of every tensor at most 1e-5, or, of a gradient that "
        "is not known as well as that, at most 6 times what stock's `eager` and `sdpa` differ by; gradients that are "
        "zero stay zero."
    ),
    "truth": (
        "Rule: errors are against the same model in float32, and measured by stock's own (the larger one of its "
        "attention implementation in use and of `eager` or `sdpa`). One batch is one draw of rounding noise, so L2 "
        "errors may be 1.5 times stock's for logits, 2.5 times for all gradients as one vector, 4 times for a single "
        "one; largest errors 2 times for logits and 6 times for a gradient, plus one unit in the last place; the loss "
        "1.5 times stock's error plus its root-mean-square error of a logit. An error is found if it is larger than "
        "stock's rounding; load the model in float32 for a verdict to 1e-5."
    ),
    "stock": (
        "Rule: errors are against stock in the same dtype, and measured by how far stock's second attention "
        "implementation (`eager` or `sdpa`) is from it: at most 2 times that for logits, 4 times for all gradients as "
        "one vector, 6 times for a single one; 3 and 9 times for the largest errors of logits and of a gradient."
    ),
}


@dataclass(frozen=True)
class TensorErrors:
    """One tensor of the patched model against the reference; `ok` if within both limits.

    `error` is the L2 norm of the difference over that of the reference, `largest` the largest absolute difference.
    """

    error: float
    limit: float
    largest: float
    largest_limit: float
    stock_error: float | None  # stock's own `error` against the same reference, where that is not stock

    @property
    def strain(self) -> float:
        """The larger share of a limit that is used up; above 1 is too much. NaN counts as infinite."""
        return max(_share(self.error, self.limit), _share(self.largest, self.largest_limit))

    @property
    def ok(self) -> bool:
        return self.strain <= 1


def _share(value: float, limit: float) -> float:
    if math.isnan(value):
        return math.inf
    if value <= limit:
        return value / limit if 0 < limit < math.inf else 0.0
    return value / limit if limit > 0 else math.inf


class Factors(NamedTuple):
    """What a result may have of stock's error, and of stock's largest absolute error."""

    error: float
    largest: float

    def plus(self, more: float) -> Factors:
        return Factors(self.error + more, self.largest + more)


@dataclass(frozen=True)
class Yardstick:
    """A reference, and what a result may differ from it by.

    `noise` holds the distances of stock results from the reference, by tensor. `floor` is a relative error that is
    always granted.
    """

    reference: Result
    noise: tuple[Mapping[str, Distance], ...]
    device: torch.device  # on which tensors are compared
    eps: float  # of the dtype that the model computes in
    logits: Factors  # also for the loss
    whole: Factors  # for all gradients as one vector, whose largest error says nothing
    single: Factors  # for one gradient
    floor: float = 0.0

    @property
    def blunt(self) -> bool:
        """Whether stock's own results are so far from the reference that any result would pass."""
        return any(max(_of_all(noise)) > _BLUNT for noise in self.noise)

    def judge(self, result: Result) -> dict[str, TensorErrors]:
        """Errors by name: "loss", "logits", "gradient" (all as one vector), then every trainable parameter's."""
        common = self.reference.keys() & result.keys()
        found = {name: distance(result[name], self.reference[name], self.device) for name in common}
        errors = {
            LOSS: self._loss(found[LOSS]),
            LOGITS: self._tensor(found[LOGITS], [noise[LOGITS] for noise in self.noise], self.logits),
            GRADIENT: self._tensor(_all_gradients(found), [_all_gradients(noise) for noise in self.noise], self.whole),
        }
        for name in [*self.reference, *(result.keys() - self.reference.keys())]:
            if name in (LOSS, LOGITS):
                continue
            if name in common:
                errors[name] = self._tensor(found[name], [noise[name] for noise in self.noise], self.single)
            else:  # a gradient that only one of them has
                errors[name] = TensorErrors(math.inf, 0.0, math.inf, 0.0, None)
        return errors

    def beside(self, stock: Result, from_truth: bool) -> Yardstick:
        """For another stock result as the reference, as with dropout.

        Two results within their limits of one truth are within the sum of these of each other: stock's own error, and
        what the patched result may have. Where the reference is no truth (`from_truth`), it was stock's already.
        """
        more = 1.0 if from_truth else 0.0
        logits, whole, single = (each.plus(more) for each in (self.logits, self.whole, self.single))
        return replace(self, reference=stock, logits=logits, whole=whole, single=single)

    def _tensor(self, found: Distance, noise: list[Distance], factors: Factors) -> TensorErrors:
        stock = max((each.relative for each in noise), default=None)
        if self.floor:
            limit = max(self.floor, factors.error * (stock or 0.0))
            return TensorErrors(found.relative, limit, found.largest, math.inf, stock)
        assert stock is not None
        ulp = self.eps * 2.0 ** math.floor(math.log2(found.scale)) if found.scale > 0 else 0.0
        largest = max(each.largest for each in noise)
        largest = factors.largest * largest + ulp if largest > 0 else ulp
        return TensorErrors(found.relative, factors.error * stock, found.largest, largest, stock)

    def _loss(self, found: Distance) -> TensorErrors:
        if self.floor:
            return self._tensor(found, [], self.logits)
        stock = max(noise[LOSS].relative for noise in self.noise)
        logit = max(noise[LOGITS].error for noise in self.noise) / math.sqrt(self.reference[LOGITS].numel())
        limit = self.logits.error * (stock + logit / found.norm) if found.norm > 0 else math.inf
        return TensorErrors(found.relative, limit, found.largest, math.inf, stock)


def _all_gradients(distances: Mapping[str, Distance]) -> Distance:
    return pooled(each for name, each in distances.items() if name not in (LOSS, LOGITS))


def _of_all(distances: Mapping[str, Distance]) -> tuple[float, float]:
    """The relative errors of the logits and of all gradients."""
    return distances[LOGITS].relative, _all_gradients(distances).relative


def _distances(result: Result, reference: Result, device: torch.device) -> dict[str, Distance]:
    return {name: distance(value, reference[name], device) for name, value in result.items()}


def in_float32(stock: Result, other: Result | None, device: torch.device) -> Yardstick:
    """`other` is stock's other attention implementation, where it fits into memory."""
    others = [] if other is None else [_distances(other, stock, device)]
    noise = tuple(each for each in others if max(_of_all(each)) <= _ALIKE)
    single, whole = Factors(6.0, math.inf), Factors(4.0, math.inf)
    return Yardstick(stock, noise, device, 2.0**-23, Factors(2.0, math.inf), whole, single, FLOAT32_LIMIT)


def against_truth(truth: Result, stock: Result, other: Result | None, device: torch.device, eps: float) -> Yardstick:
    """`other` is stock's other attention implementation, where it fits into memory."""
    own = _distances(stock, truth, device)
    noise: tuple[dict[str, Distance], ...] = (own,)
    if other is not None:
        second = _distances(other, truth, device)
        if all(theirs <= _ALIKE_FACTOR * ours for ours, theirs in zip(_of_all(own), _of_all(second))):
            noise = own, second
    return Yardstick(truth, noise, device, eps, Factors(1.5, 2.0), Factors(2.5, math.inf), Factors(4.0, 6.0))


def against_stock(stock: Result, other: Result, device: torch.device, eps: float) -> Yardstick:
    """For want of a truth: `other` is stock's other attention implementation."""
    noise = (_distances(other, stock, device),)
    return Yardstick(stock, noise, device, eps, Factors(2.0, 3.0), Factors(4.0, math.inf), Factors(6.0, 9.0))
