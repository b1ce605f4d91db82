"""What `tune` may try: a form of the net, and the work that is spent on its constants.

A form decides what a file costs where it runs: how layers are split, within which extra work, and
which layers stay in float. A recipe decides how much calibration costs; the file runs as fast.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from reptrt.core.choices import Effort
from reptrt.pipeline.options import PLAIN_INT8, CalibrateOptions
from reptrt.search.options import TuneOptions

RECIPES: tuple[Effort, ...] = get_args(Effort)
PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to calibrate the net."""

    name: str  # form and recipe; the name of its folder
    form: str
    recipe: Effort | None  # None: plain INT8
    options: CalibrateOptions

    @property
    def is_simulation(self) -> bool:
        """Whether no engine can run the file."""
        return self.options.simulation is not None


def plain(options: TuneOptions, images: int) -> Candidate:
    """Return plain INT8: thresholds at maxima, nearest codes, no splits."""
    calibrating = replace(PLAIN_INT8, target=options.target, images=images, seed=options.seed)
    return Candidate(PLAIN, PLAIN, None, calibrating)


def forms(options: TuneOptions) -> dict[str, Mapping[str, Any]]:
    """Return the forms to try, by name: options of calibration that differ from their defaults."""
    overheads = sorted(set(options.overheads))
    found: dict[str, Mapping[str, Any]] = {
        f"extra{100 * share:g}": {"max_overhead": share} for share in overheads
    }
    if options.target == "onnxruntime":
        found["identity"] = {"split": "identity"}
    most = {"max_overhead": overheads[-1]} if overheads else {}
    for number in sorted(set(options.float_layers)):
        found[f"float{number}"] = {**most, "float_nodes": (f"auto:{number}",)}
    for bits in sorted(set(options.bits)):
        found[f"bits{bits}"] = {**most, "weight_bits": bits, "activation_bits": bits}
    return found


def of_form(form: str, recipe: Effort, options: TuneOptions, images: int) -> Candidate:
    """Return a form with a recipe."""
    changes = {**forms(options)[form], "target": options.target, "recipe": recipe}
    calibrating = CalibrateOptions(images=images, seed=options.seed, **changes)
    return Candidate(f"{form}-{recipe}", form, recipe, calibrating)
