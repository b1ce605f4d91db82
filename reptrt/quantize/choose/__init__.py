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
3. An activation with full range has half the step, so a quarter of N_a. Where full range is
   possible, N_a is counted with it.
4. The budget is spent first on the splits and full ranges that remove most noise per cost.

The sum of the noises of layers, each relative to its signal, does not tell what the outputs lose.
So rules 1 and 2 are one of three policies (`Policy`), and `reptrt.pipeline.preparing` compares what
they choose by the outputs.

    decisions   options and results
    decide      the rules: `choose`
    factors     the equalization that goes with the choice
    noise       signal and noises of one layer, in each form
    cost        multiply-accumulates of a net, a form, a full range
    budget      what to spend the budget on
    ends        which layers at the ends of the net stay in float
    in_float    which layers stay in float, where that is asked for
"""

from reptrt.quantize.choose.cost import full_range_macs, num_macs, splits_macs
from reptrt.quantize.choose.decide import choose
from reptrt.quantize.choose.decisions import (
    Choice,
    ChooseOptions,
    Decision,
    Option,
    Policy,
    RangeDecision,
    full_range_of,
)
from reptrt.quantize.choose.ends import keep_ends, prices_of_ends
from reptrt.quantize.choose.factors import (
    Reader,
    best_factors,
    noise_and_gradient,
    range_of_channels,
    reader_of,
)
from reptrt.quantize.choose.in_float import FloatChoice, FloatDecision
from reptrt.quantize.choose.noise import Noises, int8_obstacle

__all__ = [
    "Choice",
    "ChooseOptions",
    "Decision",
    "FloatChoice",
    "FloatDecision",
    "Noises",
    "Option",
    "Policy",
    "RangeDecision",
    "Reader",
    "best_factors",
    "choose",
    "full_range_macs",
    "full_range_of",
    "int8_obstacle",
    "keep_ends",
    "noise_and_gradient",
    "num_macs",
    "prices_of_ends",
    "range_of_channels",
    "reader_of",
    "splits_macs",
]
