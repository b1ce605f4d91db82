"""The search: plain INT8 first, then forms and recipes by successive halving, then confirmation.

    1. plain INT8 on all images of the tuning part; if it meets the bound, nothing else is tried
    2. every form with the recipe fast, on a sixteenth of the tuning part; half of the forms go on
    3. these with balanced too, on a quarter; half go on
    4. these with accurate too, on all images of the tuning part
    5. the latency of all files of the last rung
    6. the cheapest file that meets the bound is judged on the other images; if it does not hold
       there, the next

Forms are compared by cost, from the model, and loss (`reptrt.search.halving`). Files that are
equally fast within `TIE` are chosen by their loss, so that the noise of latencies does not decide.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from reptrt.core.artifacts import sidecar_path, write_bytes, write_json
from reptrt.core.errors import ConfigError, option
from reptrt.search import candidates
from reptrt.search.candidates import RECIPES
from reptrt.search.halving import Point, front, halve, rungs
from reptrt.search.options import TuneOptions
from reptrt.search.record import BEST_FILE, RECORD_FILE, REPORT_FILE, Row, Tuned
from reptrt.search.report import write_page
from reptrt.search.trials import Trial
from reptrt.search.workbench import Workbench

_LOG = logging.getLogger(__name__)

TIE = 0.03  # files whose latencies differ by less are equally fast
MOST_LOOKS = 3  # candidates that are judged on the images to confirm on


def tune(model: Path, data: Path, eval_data: Path, folder: Path, options: TuneOptions) -> Tuned:
    """Search for the cheapest INT8 file that meets a bound; continue an earlier search.

    Args:
        model: the float ONNX file.
        data: calibration images.
        eval_data: images to judge on; one half to tune on, the other to confirm the choice on.
        folder: for all files; made if it does not exist.
        options: the bound, the target and what may be tried.

    Raises:
        ReptrtError: an input cannot be used, or plain INT8 cannot be made within the budget.
    """
    search = _Search(Workbench(model, data, eval_data, folder, options))
    search.announce()
    search.run()
    return search.finish()


class _Search:
    """One search; the rows of the workbench are filled while it goes on."""

    def __init__(self, bench: Workbench) -> None:
        self._bench, self._options, self._rows = bench, bench.options, bench.rows
        self._forms = list(candidates.forms(bench.options))
        self._simulated = [form for form in self._forms if form.startswith("bits")]
        self._real = [form for form in self._forms if form not in self._simulated]
        self._chosen, self._met, self._looks = candidates.PLAIN, False, 0

    def announce(self) -> None:
        """Say what the search will do before it starts."""
        tuning, confirming = len(self._bench.tuning), len(self._bench.confirming)
        budget = self._options.budget
        _LOG.info(
            "tune: up to %d candidates of %d forms, calibrated on %d images; judged on %d images, "
            "confirmed on %d others; budget: %s",
            *(1 + sum(self._numbers()) + len(self._simulated), len(self._forms)),
            *(self._bench.images, tuning, confirming),
            "none" if budget is None else f"{budget:g} s",
        )

    def run(self) -> None:
        """Search until something holds, or nothing is left."""
        bench = self._bench
        plain = bench.make(candidates.plain(self._options, bench.images))
        bench.judge([plain], len(bench.tuning))
        self._refuse_late()
        if self._meets(candidates.PLAIN):
            bench.measure([plain])
            if self._holds(candidates.PLAIN):
                return
        _LOG.info(
            "tune: plain INT8 took %.1f s and is not enough; all others take about %.1f min",
            *(plain.seconds, self._estimate() / 60),
        )
        finalists = [plain, *self._halve()]
        bench.measure(finalists)
        for form in self._simulated:  # reported, and never chosen
            if (trial := bench.attempt(form, RECIPES[-1])) is not None:
                bench.judge([trial], len(bench.tuning))
        self._choose([trial.candidate.name for trial in finalists])

    def finish(self) -> Tuned:
        """Write the chosen file, the record and the report."""
        bench, options = self._bench, self._options
        self._mark_front()
        chosen, best = bench.made[self._chosen].path, bench.folder / BEST_FILE
        sidecar_path(best).unlink(missing_ok=True)
        write_bytes(best, chosen.read_bytes())
        shutil.copyfile(sidecar_path(chosen), sidecar_path(best))
        tuned = Tuned(
            folder=bench.folder,
            metric=options.measure,
            limit=options.limit,
            target=options.target,
            rows=tuple(self._rows.values()),
            chosen=self._chosen,
            met=self._met,
            looks=self._looks,
            of_float=bench.of_float,
            tuning_images=len(bench.tuning),
            confirming_images=len(bench.confirming),
            seconds=bench.seconds,
            hints=() if self._met else self._hints(),
        )
        result = {**tuned.to_dict(), "folder": "."}
        write_json(bench.folder / RECORD_FILE, {**bench.record, "result": result})
        write_page(bench.folder / REPORT_FILE, tuned, bench.model.name)
        return tuned

    def _halve(self) -> list[Trial]:
        """Return the trials of the forms that reach the last rung."""
        bench, alive = self._bench, self._real
        sizes = rungs(len(bench.tuning), len(RECIPES))
        sizes = (sizes[0],) * (len(RECIPES) - len(sizes)) + sizes
        for recipe, size in zip(RECIPES, sizes, strict=True):
            for form in alive:
                bench.attempt(form, recipe)
            bench.judge(self._of(alive), size)
            if recipe != RECIPES[-1]:
                alive = halve(self._points(alive))
        return self._of(alive)

    def _of(self, forms: Sequence[str]) -> list[Trial]:
        return [t for t in self._bench.made.values() if t.candidate.form in forms]

    def _points(self, forms: Sequence[str]) -> list[Point]:
        """Return cost by the model and least loss of each form that has a file."""
        points = []
        for form in forms:
            rows = [row for row in self._rows.values() if row.form == form and row.judged]
            if rows:
                best = min(rows, key=_loss)
                points.append(Point(form, best.modelled or 1.0, _loss(best)))
        return points

    def _choose(self, names: Sequence[str]) -> None:
        """Take the cheapest candidate that meets the bound on both parts.

        Files with the same bytes are one candidate.
        """
        unique = {self._rows[name].sha256: name for name in reversed(names)}
        rest = [name for name in unique.values() if self._meets(name)]
        rest = [name for name in rest if self._rows[name].confirmed is None]
        while rest and self._looks < MOST_LOOKS:
            name = self._cheapest(rest)
            if self._holds(name):
                return
            rest.remove(name)
        final = [name for name in names if self._rows[name].is_final]
        self._chosen = min(final, key=lambda name: _loss(self._rows[name]))
        self._bench.confirm(self._chosen)

    def _cheapest(self, names: Sequence[str]) -> str:
        """Return the cheapest candidate; of equally fast ones, the most accurate."""
        ratios = {name: cost.ratio for name in names if (cost := self._rows[name].cost)}
        most = min(ratios.values()) * (1 + TIE)
        tied = [name for name, ratio in ratios.items() if ratio <= most]
        return min(tied, key=lambda name: (_loss(self._rows[name]), ratios[name]))

    def _holds(self, name: str) -> bool:
        """Judge a candidate on the other images; choose it if it meets the bound there."""
        self._looks += 1
        loss = self._bench.confirm(name).loss
        if loss > self._options.limit:
            _LOG.info("tune: %s does not hold on unseen images (%.3g)", name, loss)
            return False
        self._chosen, self._met = name, True
        return True

    def _meets(self, name: str) -> bool:
        row = self._rows[name]
        return row.is_final and _loss(row) <= self._options.limit

    def _mark_front(self) -> None:
        final = [row for row in self._rows.values() if row.is_final and not row.is_simulation]
        points = [Point(row.name, row.cost.ratio, _loss(row)) for row in final if row.cost]
        for point in front(points):
            self._rows[point.name].on_front = True

    def _numbers(self) -> list[int]:
        """Return how many forms are made with each recipe, if nothing fails."""
        numbers, number = [], len(self._real)
        for _ in RECIPES:
            numbers.append(number)
            number = (number + 1) // 2
        return numbers

    def _estimate(self) -> float:
        """Return the seconds of all calibrations but that of plain INT8."""
        seconds = len(self._simulated) * self._bench.expected(RECIPES[-1])
        for recipe, number in zip(RECIPES, self._numbers(), strict=True):
            seconds += number * self._bench.expected(recipe)
        return seconds

    def _refuse_late(self) -> None:
        """Refuse a budget that is over before anything but plain INT8 was tried."""
        left, spent = self._bench.seconds_left, self._bench.seconds
        if left is None or left > 0 or self._meets(candidates.PLAIN):
            return
        enough = spent + 2 * self._bench.expected("fast")
        raise ConfigError(
            f"{option('budget')}: got {self._options.budget:g} s, plain INT8 alone took "
            f"{spent:.1f} s and does not meet the bound; give {max(enough, 1):.0f}s or more (what "
            f"is done in {self._bench.folder} is kept)"
        )

    def _hints(self) -> tuple[str, ...]:
        """Return what would help where nothing meets the bound."""
        best, options = self._rows[self._chosen], self._options
        hints = []
        if skipped := sum(row.state.startswith("skipped") for row in self._rows.values()):
            hints.append(f"{skipped} candidates did not fit the budget: give more time")
        worst = max(_loss(best), best.confirmed.loss if best.confirmed else _loss(best))
        if options.measure == "sqnr":
            hints.append(f"{best.name} would meet a bound of {-worst:.1f} dB")
        else:
            hints.append(f"{best.name} would meet a bound of {worst + 0.005:.2f} points")
        most = max(options.float_layers, default=1)
        hints.append(f"more than {most} layers in float, or more extra work, may help")
        judged = best.judged
        if judged is not None and judged.low is not None and judged.high is not None:
            half = (judged.high - judged.low) / 2
            if half > options.max_drop:
                hints.append(
                    f"{judged.images} images tell losses apart to {half:.2f} points only: judge on "
                    "more images"
                )
        return tuple(f"  {hint}" for hint in hints)


def _loss(row: Row) -> float:
    return float("inf") if row.judged is None else row.judged.loss
