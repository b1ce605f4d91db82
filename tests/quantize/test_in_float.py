"""Which layers stay in float: the rules, with errors made up."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from reptrt.graph.net import net_from_model
from reptrt.quantize.choose.in_float import FloatChoice, Price, keep_in_float, prices_of
from tests.support.qdq_nets import residual_net

ALONE = {"a": 5.0, "b": 40.0, "c": 30.0, "d": 20.0, "e": 1.0}


def choose(most: int, prices: Mapping[str, float], effect: Mapping[str, float]) -> FloatChoice:
    """Choose where every layer takes a given part of the error away."""

    def error(layers: Sequence[str]) -> list[float]:
        return [0.5 * (100.0 - sum(effect[layer] for layer in layers))] * 2

    priced = {layer: Price(prices.get(layer, 0.0), 0.01) for layer in ALONE}
    return keep_in_float(ALONE, priced, most, error, 8)


def test_the_worst_layers_are_kept_until_there_are_enough() -> None:
    effect = {"a": 5.0, "b": 40.0, "c": 30.0, "d": 20.0, "e": 1.0}
    choice = choose(2, {}, effect)
    assert choice.kept == ("b", "c")
    assert (choice.error_before, choice.error_after) == (100.0, 30.0)
    assert choice.gain == pytest.approx(0.7)
    assert [d.layer for d in choice.decisions] == ["b", "c"]
    assert choice.decisions[1].gain == pytest.approx(0.5)  # of the 60 that b left
    assert choice.summary == "b, c; the error of the outputs falls by 70 % or more"


def test_a_layer_that_costs_more_than_it_brings_is_passed_over() -> None:
    effect = {"a": 0.0, "b": 40.0, "c": 30.0, "d": 20.0, "e": 1.0}
    choice = choose(2, {"b": 0.45, "c": 0.31}, effect)
    assert choice.kept == ("d",)
    b, c, d, a = choice.decisions
    assert b.gain is None  # not even tried: its share alone is below its price
    assert c.gain == pytest.approx(0.3)  # of the error, for 31 % of the work
    assert "45.0 % of the work" in b.reason
    assert d.gain == pytest.approx(0.2)
    assert a.reason == "float takes only 0.0 % of the error away"


def test_a_layer_whose_error_others_cover_is_not_kept() -> None:
    choice = choose(1, {}, {"a": 30.0, "b": 4.9, "c": -3.0, "d": 5.1, "e": 90.0})
    assert choice.kept == ("d",)
    assert choice.decisions[1].gain == pytest.approx(-0.03)


def test_nothing_pays() -> None:
    choice = choose(3, {}, dict.fromkeys(ALONE, 0.0))
    assert choice.kept == ()
    assert choice.gain == 0.0
    assert choice.summary.startswith("none, no layer pays; b: float takes only 0.0 % of the error")


def test_one_layer_stays_in_int8() -> None:
    assert choose(9, {}, dict(ALONE)).kept == ("b", "c", "d", "a")


def test_the_layers_together_must_pay_too() -> None:
    choice = choose(2, {"b": 0.3, "c": 0.2}, {"a": 0.0, "b": 40.0, "c": 30.0, "d": 0.0, "e": 0.0})
    assert choice.kept == ("b", "c")
    assert choice.pays
    assert not replace(choice, gain=0.49).pays
    assert not choice.without_any().kept
    assert choice.without_any().error_after == choice.error_before


def test_prices_are_shares_of_work_and_of_bytes() -> None:
    prices = prices_of(net_from_model(residual_net()))
    assert sum(price.macs for price in prices.values()) == pytest.approx(1.0)
    assert sum(price.moved for price in prices.values()) == pytest.approx(1.0)
    assert prices["head"].macs < 0.01  # one position
    assert prices["stem"].share == prices["stem"].macs > 0.2


def test_a_fall_must_show_in_both_halves() -> None:
    def error(layers: Sequence[str]) -> list[float]:
        return [
            50.0 - 40.0 * ("b" in layers),
            50.0 - 1.0 * ("b" in layers) - 10.0 * ("c" in layers),
        ]

    choice = keep_in_float(ALONE, {layer: Price(0.01, 0.01) for layer in ALONE}, 2, error, 8)
    b, c, *_ = choice.decisions
    assert (b.kept, c.kept) == (False, False)  # each helps one half only
    assert b.gain == pytest.approx(0.02)
