"""Plans of quantized nets are compared: numbers to the bit, readers in any order."""

import numpy as np

from reptrt.graph.plan import QuantPlan


def assert_same_plan(found: QuantPlan, expected: QuantPlan) -> None:
    """Two plans quantize the same tensors and weights in the same way."""
    assert found.activations.keys() == expected.activations.keys()
    for tensor, wanted in expected.activations.items():
        activation = found.activations[tensor]
        assert sorted(activation.readers) == sorted(wanted.readers), tensor
        assert (activation.scale, activation.grid) == (wanted.scale, wanted.grid), tensor
    assert _groups(found) == _groups(expected)
    assert found.weights.keys() == expected.weights.keys()
    for node, wanted_weight in expected.weights.items():
        weight = found.weights[node]
        assert weight.axis == wanted_weight.axis, node
        assert weight.codes.dtype == wanted_weight.codes.dtype == np.int8
        np.testing.assert_array_equal(weight.codes, wanted_weight.codes, err_msg=node)
        np.testing.assert_array_equal(weight.scale, wanted_weight.scale, err_msg=node)
    assert sorted(found.excluded) == sorted(expected.excluded)


def _groups(plan: QuantPlan) -> set[frozenset[str]]:
    """The tensors of each group; the numbers of groups mean nothing."""
    numbers = {activation.group for activation in plan.activations.values()}
    return {
        frozenset(t for t, activation in plan.activations.items() if activation.group == number)
        for number in numbers
    }
