"""Rounding of weights in closed form, with the errors of a channel compensating each other.

    windows.py        what the outputs of a layer are products of: rows of its input
    moments.py        covariances of these rows over the calibration images
    curvature.py      how much errors at the outputs of layers count at the outputs of the net
    nearest_plane.py  codes that are good for a covariance, and for a curvature if it is known
    compensate.py     codes for the layers of a net, judged on held-out images

Learned rounding is in `reptrt.quantize.reconstruct`.
"""
