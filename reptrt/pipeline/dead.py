"""Tensors that are 0 on all calibration images: what that means for a net.

A ReLU in a squeeze-excite gate, or in a side branch, may have died in training. Its output has no
scale, so it gets no Q/DQ pair, and a layer that reads it stays in float: it computes its bias. The
report names both. If every output is reached only through such tensors, the net says the same of
all images, and calibration is refused.
"""

from collections.abc import Collection, Mapping, Sequence

from reptrt.core.errors import CalibrationError
from reptrt.graph.flow import tail_of
from reptrt.graph.net import Net, producer
from reptrt.graph.placement import Activation
from reptrt.quantize.calib.histogram import Histogram


def dead_tensors(
    activations: Sequence[Activation], histograms: Mapping[str, Histogram]
) -> tuple[str, ...]:
    """Return the tensors of all groups that are 0 on all images; a group shares one scale."""
    alive = {a.group for a in activations if histograms[a.tensor].maximum > 0.0}
    return tuple(a.tensor for a in activations if a.group not in alive)


def refuse_dead_trunk(net: Net, dead: Collection[str], images: int) -> None:
    """Refuse a net whose outputs are all reached only through dead tensors.

    Raises:
        CalibrationError: it is one; the message names the first dead tensor.
    """
    if not dead:
        return
    tensors = net.graph.tensors()
    makers = [producer(tensors[name]) for name in dead]
    names = [maker.name for maker in makers if maker is not None]
    tail = tail_of(net.graph, names)
    ends = [producer(tensor) for tensor in net.graph.outputs]
    if len(names) == len(makers) and any(end is None or end.name not in tail for end in ends):
        return
    raise CalibrationError(
        f"{next(iter(dead))}: is 0 on all {images} images, and no output depends on them but "
        "through it; check the images, and the weights before it"
    )
