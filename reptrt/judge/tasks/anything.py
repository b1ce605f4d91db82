"""``any``: outputs that mean nothing to us; only their distance to the reference's is measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from reptrt.data.dataset import Dataset, Images
from reptrt.judge.options import TaskOptions
from reptrt.judge.outputs import Outputs
from reptrt.judge.tasks.classify import Classify
from reptrt.judge.tasks.protocol import Measures


def _nothing() -> dict[str, None]:
    return {"top1": None, "top5": None}


@dataclass(frozen=True, slots=True)
class Silence:
    """What this task finds out: nothing. The fields of `classify` stay, as null."""

    measures: Measures = field(default_factory=_nothing)
    rows: Mapping[str, Measures] = field(default_factory=dict)


class _Tally:
    def add(self, outputs: Outputs) -> None:
        """Ignore the outputs."""

    def findings(self) -> Silence:
        return Silence()


class Anything:
    """Outputs of any kind; see `reptrt.judge.tasks.protocol`."""

    columns = Classify.columns
    ranked_by: tuple[str, ...] = ()

    def __init__(self, options: TaskOptions, images: Images) -> None:
        pass

    def tally(self, name: str, dataset: Dataset) -> _Tally:
        """Return a tally that ignores everything."""
        return _Tally()

    def compare(self, reference: Silence | None, findings: Silence) -> Measures:
        """Return no agreement."""
        return {"agreement": None}
