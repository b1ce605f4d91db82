"""Choose a weight split for each layer, and the full range of codes for activations.

Two noises are compared. Both are powers at the layer's output, per position, summed over output
channels:

    weight noise      N_w = sum (W - Q(W))[o,i,t]^2  Var[x_i]      (bias correction takes the mean)
    activation noise  N_a = sum W[o,i,t]^2  step_x^2 / 12

Rules (ours):

1. N_a does not depend on how the weights are quantized. A layer with N_w <= N_a is healthy and
   stays whole. Ordinary kernels have N_w / N_a from 0.1 to 0.5, trained rep kernels from 2 to 20.
2. Any other layer takes the cheapest form with N_w <= N_a / 4 (then its weights cost less than
   1 dB), or the form with the least N_w if no form gets there.
3. If the sum of N_w / signal over all layers is at most the sum of N_a / signal, the whole net is
   left without splits: they would gain at most 3 dB.
4. An activation with full range has half the step, so a quarter of N_a. Where full range is
   possible, N_a is counted with it.
5. The budget is spent first on the splits and full ranges that remove most noise per cost.

    decisions   options and results
    decide      the five rules: `choose`
    noise       signal and noises of one layer, in each form
    cost        multiply-accumulates of a net, a form, a full range
    budget      what to spend the budget on
    in_float    which layers stay in float, where that is asked for
"""

from reptrt.quantize.choose.cost import num_macs
from reptrt.quantize.choose.decide import choose
from reptrt.quantize.choose.decisions import (
    Choice,
    ChooseOptions,
    Decision,
    Option,
    RangeDecision,
    full_range_of,
)
from reptrt.quantize.choose.in_float import FloatChoice, FloatDecision
from reptrt.quantize.choose.noise import int8_obstacle

__all__ = [
    "Choice",
    "ChooseOptions",
    "Decision",
    "FloatChoice",
    "FloatDecision",
    "Option",
    "RangeDecision",
    "choose",
    "full_range_of",
    "int8_obstacle",
    "num_macs",
]
