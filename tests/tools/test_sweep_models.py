"""tools/sweep_models.py on two small nets: a row each, the page, and taking it up again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from reptrt.sources.models.layers import ConvSpec
from reptrt.sources.models.repvgg import RepVGGBlock
from tests.support.helpers import load_tool

tool = load_tool("sweep_models")
Row = type(tool.rows()[0])


def small() -> nn.Module:
    block = RepVGGBlock(ConvSpec(3, 16))
    return nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


class Failing(nn.Module):
    """A net that runs in torch and that no exporter takes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 2:
            raise ValueError("not two images")
        y: torch.Tensor = self.conv(x)
        return y


def fused(module: nn.Module) -> nn.Module:
    return nn.Conv2d(3, 16, 3) if isinstance(module, nn.Sequential) else module


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs the tool on two nets and returns its results and its output."""
    rows = [Row("small", "test", small, (3, 8, 8), fused)]
    rows.append(Row("failing", "test", Failing, (3, 8, 8), fused))
    monkeypatch.setattr(tool, "rows", lambda: rows)
    monkeypatch.setattr(tool.logging, "disable", lambda level: None)

    def run(*arguments: str) -> tuple[dict[str, Any], str]:
        output = tmp_path / "out.json"
        command = ["-o", str(output), "--no-engine", *arguments]
        done = CliRunner().invoke(tool.main, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(output.read_text())["nets"], done.output

    return run


def test_a_row_works_or_is_named_with_its_reason(sweep: Any, tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    nets, _ = sweep("--page", str(page))
    row = nets["small"]
    assert row["failed"] == {}
    assert (row["convs_theirs"], row["convs"], row["norms_theirs"], row["norms"]) == (1, 1, 0, 0)
    assert (row["int8_layers"], row["layers"], row["errors"]) == (2, 2, 0)
    assert 15 < row["sqnr_db"]["output"] < 80
    assert 15 < row["input_sqnr_db"]["output"] < 80
    assert row["engine"] is None
    assert list(nets["failing"]["failed"]) == ["export"]
    text = page.read_text()
    assert "| small | test | 3x8x8 | 1 | 0 | 2 of 2 |" in text
    (reason,) = [line for line in text.splitlines() if line.startswith("- export: ")]
    assert "not two images" in reason
    assert reason.endswith(": failing")


def test_results_are_kept_and_failures_tried_again(sweep: Any) -> None:
    nets, said = sweep("--only", "small")
    assert list(nets) == ["small"]
    again, said = sweep()
    assert "small" not in said
    assert "failing" in said
    assert again["small"] == nets["small"]
    assert "small" in sweep("--only", "small", "--again")[1]


def test_every_net_of_the_table_has_its_own_name() -> None:
    rows = load_tool("sweep_models").rows()
    assert len({row.name for row in rows}) == len(rows) > 40
