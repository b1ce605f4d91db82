"""Split layers of a float net: into given forms, or all layers as the options ask for."""

from collections.abc import Mapping

from reptrt.core.choices import SplitForm
from reptrt.graph.net import Net, weighted_nodes
from reptrt.pipeline.options import CalibrateOptions
from reptrt.quantize.choose import int8_obstacle
from reptrt.rewrite.contract import Skipped
from reptrt.rewrite.split_coarse_fine import split_coarse_fine
from reptrt.rewrite.split_identity import split_identity


def split_as_asked(
    net: Net, forms: Mapping[str, SplitForm], options: CalibrateOptions
) -> tuple[Skipped, ...]:
    """Split layers where INT8 summands pay; return those that stay whole, with the reason.

    Args:
        net: a float net; changed in place.
        forms: layer -> form to split it into, the same for all.
        options: the grid of weights and the precision of summands.
    """
    nodes = {node.name: node for node in weighted_nodes(net.graph)}
    obstacles: dict[str, str] = {}
    if options.summands == "int8":
        reasons = {
            layer: int8_obstacle(nodes[layer], form, options.grids[1])
            for layer, form in forms.items()
        }
        obstacles = {layer: reason for layer, reason in reasons.items() if reason is not None}
    paying = {layer: form for layer, form in forms.items() if layer not in obstacles}
    obstacles |= {skip.node: skip.reason for skip in split_layers(net, paying, options)}
    return tuple(Skipped(layer, obstacles[layer]) for layer in forms if layer in obstacles)


def split_layers(
    net: Net, forms: Mapping[str, SplitForm], options: CalibrateOptions
) -> tuple[Skipped, ...]:
    """Split layers of a float net in place; return those that cannot be split, with the reason.

    Args:
        net: a float net.
        forms: layer -> form to split it into; "none" leaves it whole.
        options: the grid of weights and the precision of summands.
    """
    grid, precision = options.grids[1], options.summands

    def of(form: SplitForm) -> list[str]:
        return [layer for layer, chosen in forms.items() if chosen == form]

    scalar: SplitForm = "identity-scalar"
    reports = (
        split_identity(net, of("identity"), grid=grid, precision=precision),
        split_identity(net, of(scalar), grid=grid, form=scalar, precision=precision),
        split_coarse_fine(net, of("coarse-fine"), grid=grid, precision=precision),
    )
    return tuple(skip for report in reports for skip in report.skipped)
