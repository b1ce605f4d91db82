"""Recipes of `calibrate`: what is done where no option says otherwise.

fast, balanced, accurate    ours, by the work that is spent on accuracy
cfws                        the method of CFWS (arXiv 2312.10588) and nothing else: every layer that
                            has the form is split coarse and fine, and rounded to nearest; the
                            summands are not rounded; thresholds by KL, of which the formula is ours
repapq                      the method of RepAPQ (arXiv 2402.16121) and nothing else: a gain and a
                            shift per channel, rounding and steps, learned with MAE, each unit
                            supervised by the output of its stage; they start from the largest
                            values and nearest codes; numbers of iterations and rates are ours

The recipes of papers exist so that methods can be compared; docs/methods.md says what is theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from reptrt.core.choices import Recipe, Rounding, SplitMode, SplitPrecision
from reptrt.quantize.calib.options import ThresholdOptions
from reptrt.quantize.reconstruct.options import LearnOptions

_AUTO = ThresholdOptions("auto")


@dataclass(frozen=True, slots=True)
class Parts:
    """What calibration does; every part is an option of `calibrate` that takes its place."""

    threshold: ThresholdOptions = _AUTO
    equalize: bool = True
    split: SplitMode = "auto"
    split_precision: SplitPrecision | None = None  # None: as the target adds fastest
    full_range: bool = True
    correct_bias: bool = True
    rounding: Rounding = "gptq"
    qprep: bool = False
    learn: LearnOptions | None = None  # how the parts are learned that are; None: nothing is


_ALONE = Parts(
    ThresholdOptions("max"),
    equalize=False,
    split="none",
    full_range=False,
    correct_bias=False,
    rounding="nearest",
)
RECIPES: Mapping[Recipe, Parts] = {
    "fast": Parts(),
    "balanced": Parts(rounding="learned", qprep=True, learn=LearnOptions(iterations=40)),
    "accurate": Parts(rounding="learned", qprep=True, learn=LearnOptions()),
    "cfws": replace(
        _ALONE, threshold=ThresholdOptions("kl"), split="coarse-fine", split_precision="float"
    ),
    "repapq": replace(
        _ALONE, rounding="adaround", qprep=True, learn=LearnOptions(stage_weight=1.0)
    ),
}
