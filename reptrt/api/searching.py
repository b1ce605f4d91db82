"""tune, as a program calls it."""

import os
from typing import Any

from reptrt.api.networks import path_from
from reptrt.core.keywords import options_from, takes
from reptrt.search.options import TuneOptions
from reptrt.search.record import Tuned
from reptrt.search.tuning import tune as search


@takes(TuneOptions)
def tune(
    net: str | os.PathLike[str],
    data: str | os.PathLike[str],
    eval_data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    options: TuneOptions | None = None,
    **changes: Any,
) -> Tuned:
    """Search for the cheapest INT8 file that meets a bound on accuracy.

    >>> tuned = reptrt.tune("net.onnx", "calib", "val", "search", max_drop=0.1, budget=600)
    >>> tuned.met, tuned.chosen, tuned.path

    Everything that a search reads is a file, so that one that was stopped can continue.

    Args:
        net: a float .onnx file.
        data: calibration images: a folder, an .npz or an .npy.
        eval_data: images to judge on; one half to tune on, the other to confirm the choice on.
        output: the folder of the search; made if it does not exist.
        options: the options as one value, in place of their defaults.
        **changes: single options.

    Raises:
        ReptrtError: an input cannot be used, or the budget is too short for plain INT8.
    """
    others = ("net", "data", "eval_data", "output")
    tuning = options_from(TuneOptions, options, changes, others)
    return search(
        path_from(net, "net"),
        path_from(data, "data"),
        path_from(eval_data, "eval_data"),
        path_from(output, "output"),
        tuning,
    )
