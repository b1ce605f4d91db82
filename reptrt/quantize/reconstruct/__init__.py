"""Learned calibration, unit by unit: ABC after RepAPQ (arXiv 2402.16121), and our additions.

`reconstruct` changes the constants of a Q/DQ graph: the codes of weights (learned rounding), the
gain and shift of each layer (QPRep) and the steps of activations.

    units     cut the graph into units
    cache     keep both nets' activations at the boundaries between units, for all images
    correct   weights that make up for the errors of the units before, in closed form
    loss      the error of a unit's outputs, as it counts at the outputs of the net
    learn     fit one unit to the float net's output by gradient descent
    rounding, fake_quantize    what gradients pass through
    state     find the learnable constants of the graph, hold their values, write them back
    attempt   corrected or learned values of one unit, where held-out images agree
    driver    unit after unit
    resume    keep finished units on disk, so that a stopped run can go on
"""
