"""Learned calibration, unit by unit: ABC after RepAPQ (arXiv 2402.16121), and what goes beyond it.

`reconstruct` changes the constants of a Q/DQ graph: codes of weights (learned rounding), gain and
shift of each layer (QPRep), steps of activations. Data flow:

    units        the graph cut into units, in order
    cache        both nets' activations between units, for all calibration images
    learn        one unit by gradient descent on its output error
    state        where things sit in the graph, their values, and how a run takes them
    driver       unit after unit; what is not better on held-out images is not kept
"""
