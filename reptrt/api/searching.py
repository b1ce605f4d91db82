"""tune and sweep, as a program calls them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reptrt.api.networks import path_from
from reptrt.core.keywords import options_from, takes
from reptrt.search.options import TuneOptions
from reptrt.search.record import Tuned
from reptrt.search.tuning import tune as search
from reptrt.sweeping.options import SweepOptions
from reptrt.sweeping.reading import read_sheet, sheet_from
from reptrt.sweeping.record import Swept
from reptrt.sweeping.sweeping import sweep as work


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


@takes(SweepOptions)
def sweep(
    file: Mapping[str, Any] | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    options: SweepOptions | None = None,
    **changes: Any,
) -> Swept:
    """Calibrate and judge many nets for many targets with many recipes.

    >>> swept = reptrt.sweep("nets.toml", "swept", workers=8)
    >>> [(row.name, row.sqnr_db) for row in swept.rows if row.is_finished]

    Trials that fail are rows of the result; what is finished is kept, so that a sweep that was
    stopped can continue.

    Args:
        file: a TOML file, or its content as a mapping; paths in a mapping start from the current
            folder.
        output: the folder of the table and the report; made if it does not exist.
        options: the options as one value, in place of their defaults.
        **changes: single options.

    Raises:
        ReptrtError: the file or an input cannot be used, or the workers or the store cannot be
            reached.
    """
    sweeping = options_from(SweepOptions, options, changes, ("file", "output"))
    folder = path_from(output, "output")
    if isinstance(file, Mapping):
        return work(sheet_from(file, Path(), "file"), folder, sweeping)
    return work(read_sheet(path_from(file, "file")), folder, sweeping)
