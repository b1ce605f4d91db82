"""The record of splits: what was written is read, and what nobody wrote is refused."""

import json

import pytest

from reptrt.core.errors import ArtifactError
from reptrt.graph.net import Net, net_from_model
from reptrt.graph.splits import Split, read_splits, record_splits
from tests.support.onnx_nets import plain_chain

SPLIT = Split("c1", "identity-scalar", "c1.sum", "c1.identity", "c1.rest", "int8")


def recorded(**changes: str) -> Net:
    """A net whose record of one split was changed by hand."""
    net = net_from_model(plain_chain())
    record_splits(net, [SPLIT])
    stored = json.loads(net.metadata["reptrt.splits"])
    stored["c1"] |= changes
    net.metadata["reptrt.splits"] = json.dumps(stored)
    return net


def test_splits_are_read_as_they_were_written() -> None:
    assert read_splits(recorded()) == (SPLIT,)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("form", "none", "identity-scalar or identity or coarse-fine"),
        ("form", "fine", "identity-scalar or identity or coarse-fine"),
        ("form", 7, "identity-scalar or identity or coarse-fine"),
        ("precision", "fp8", "float or int8"),
    ],
)
def test_a_choice_that_does_not_exist(field: str, value: str, expected: str) -> None:
    message = rf"reptrt.splits: .*c1: {field} {value!r}, expected {expected}"
    with pytest.raises(ArtifactError, match=message):
        read_splits(recorded(**{field: value}))
