"""Compare the plans of quantized nets: numbers to the bit, readers in any order."""

import numpy as np

from reptrt.graph.plan import QuantPlan


def assert_same_plan(actual: QuantPlan, expected: QuantPlan) -> None:
    """Assert that two plans quantize the same tensors and weights in the same way."""
    assert actual.activations.keys() == expected.activations.keys()
    for tensor, activation in expected.activations.items():
        same = actual.activations[tensor]
        assert sorted(same.readers) == sorted(activation.readers), tensor
        assert (same.scale, same.grid) == (activation.scale, activation.grid), tensor
    assert _groups(actual) == _groups(expected)
    assert actual.weights.keys() == expected.weights.keys()
    for node, expected_weight in expected.weights.items():
        weight = actual.weights[node]
        assert weight.axis == expected_weight.axis, node
        assert weight.codes.dtype == expected_weight.codes.dtype == np.int8
        np.testing.assert_array_equal(weight.codes, expected_weight.codes, err_msg=node)
        np.testing.assert_array_equal(weight.scale, expected_weight.scale, err_msg=node)
    assert sorted(actual.excluded) == sorted(expected.excluded)


def _groups(plan: QuantPlan) -> set[frozenset[str]]:
    """Return the tensors of each group; the numbers of groups may differ between equal plans."""
    numbers = {activation.group for activation in plan.activations.values()}
    return {
        frozenset(t for t, activation in plan.activations.items() if activation.group == number)
        for number in numbers
    }
