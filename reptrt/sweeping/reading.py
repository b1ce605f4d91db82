"""Read what a sweep is to do from TOML, and refuse what cannot be done before anything starts.

    data = "calib"                      images; paths are relative to the file
    eval_data = "val"                   default: data
    targets = ["tensorrt"]              what every trial is made for
    recipes = ["plain", "fast"]
    [calibrate]                         options of every trial, by the names that Python uses
    [eval]                              the task, and how many images
    [variants.NAME]                     further options of calibrate; each is one more trial
    [placement]                         what a trial needs of a machine
    [engine]                            build engines too
    [nets.NAME]                         source, weights, architecture, export, and any of the above

Options of a trial: the defaults, [calibrate], that of the net, the variant; the later wins.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from reptrt.core.choices import TargetName
from reptrt.core.errors import ConfigError
from reptrt.core.keywords import changed
from reptrt.data.dataset import count_images
from reptrt.judge.tasks import open_task
from reptrt.pipeline import at_most_all
from reptrt.pipeline.options import PLAIN_INT8, CalibrateOptions, ExportOptions
from reptrt.runs.inputs import source_files
from reptrt.sources.models import training_only
from reptrt.sources.options import ArchitectureOptions
from reptrt.sources.source import Source
from reptrt.sweeping.checking import (
    changed_at,
    check_keys,
    check_name,
    located,
    stated,
    table_of,
)
from reptrt.sweeping.sheet import (
    EnginePlan,
    JudgingOptions,
    NetPlan,
    RecipeName,
    Sheet,
    TrialPlan,
)
from reptrt.sweeping.tasks import Placement
from reptrt.trt.options import BuildOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_SHARED = ("data", "eval_data", "targets", "recipes", "calibrate", "eval", "placement", "engine")
_OF_FILE = (*_SHARED, "export", "variants", "nets")
_OF_NET = (*_SHARED, "export", "variants", "source", "weights", "architecture", "seed")


def read_sheet(file: Path) -> Sheet:
    """Return what a TOML file describes.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value cannot be used.
        ReptrtError: a file that it names is missing or cannot be used.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(
            f"{file}: cannot be read ({err.strerror or err}); expected a TOML file"
        ) from err
    except ValueError as err:  # of TOML or of UTF-8
        raise ConfigError(f"{file}: not a TOML file ({' '.join(str(err).split())})") from err
    return sheet_from(content, file.parent, str(file))


def sheet_from(content: Mapping[str, Any], folder: Path, where: str) -> Sheet:
    """Return what the content of a file describes.

    Args:
        content: as `tomllib` reads it.
        folder: that relative paths start from.
        where: name of the content, for messages.

    Raises:
        ReptrtError: as `read_sheet`.
    """
    check_keys(content, _OF_FILE, where)
    nets = table_of(content, "nets", where)
    if not nets:
        raise ConfigError(f"{where}: there are no nets; add a table [nets.NAME] for each")
    reader = _Reader(content, folder.resolve(), where)
    return Sheet(tuple(reader.net(name, table) for name, table in nets.items()))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the nets of one file."""

    content: Mapping[str, Any]
    folder: Path
    where: str

    def net(self, name: str, own: Any) -> NetPlan:
        """Return one net with its trials."""
        at = f"{self.where}: [nets.{name}]"
        check_name(name, at)
        if not isinstance(own, dict):
            raise ConfigError(f"{at}: got {own!r}, expected a table")
        check_keys(own, _OF_NET, at)
        data = self._images(own, "data", at, None)
        eval_data = self._images(own, "eval_data", at, data)
        judging = self._options(own, "eval", JudgingOptions())
        stated(f"{at} eval", lambda: open_task(judging, eval_data))
        return NetPlan(
            name,
            self._source(own, at),
            self._options(own, "export", ExportOptions()),
            data,
            eval_data,
            judging,
            tuple(self._trials(name, own, data, at)),
            self._engine(own, at),
            self._options(own, "placement", Placement()),
        )

    def _source(self, own: Mapping[str, Any], at: str) -> Source:
        name, weights = own.get("source"), own.get("weights")
        if not isinstance(name, str):
            raise ConfigError(
                f"{at}: source: got {name!r}, expected a zoo name, timm:NAME, FILE.py:FACTORY or an"
                " .onnx file"
            )
        architecture = table_of(own, "architecture", at)
        source = stated(
            at,
            lambda: Source(
                located(name, self.folder),
                None if weights is None else self._path(weights, f"{at}: weights"),
                changed(ArchitectureOptions(), architecture),
                **({"seed": own["seed"]} if "seed" in own else {}),
            ),
        )
        if not isinstance(source.seed, int) or source.seed < 0:
            raise ConfigError(f"{at}: seed: got {source.seed!r}, expected a whole number from 0 up")
        if not (source.is_onnx or source.is_timm or source.is_factory):
            stated(at, lambda: training_only(source.name))  # refuses names that nobody knows
        for path in source_files(source):
            if not path.is_file():
                raise ConfigError(f"{at}: {path}: no such file")
        return source

    def _trials(self, net: str, own: Mapping[str, Any], data: Path, at: str) -> Iterable[TrialPlan]:
        base = {**table_of(self.content, "calibrate", self.where), **table_of(own, "calibrate", at)}
        variants = self._variants(own, at)
        for target in self._list(own, "targets", get_args(TargetName), ["tensorrt"], at):
            for recipe in self._list(own, "recipes", get_args(RecipeName), ["fast"], at):
                for variant, more in variants.items():
                    name = "/".join([net, target, recipe, *([variant] if variant else [])])
                    options = self._calibrating(name, target, recipe, {**base, **more})
                    if "images" not in {**base, **more}:
                        options = at_most_all(options, data)
                    yield TrialPlan(name, options.target, recipe, variant or None, options)

    def _calibrating(
        self, trial: str, target: str, recipe: str, changes: Mapping[str, Any]
    ) -> CalibrateOptions:
        at = f"{self.where}: {trial}"
        for axis in ("target", "recipe"):
            if axis in changes:
                raise ConfigError(f"{at}: {axis}: is given by the list {axis}s; leave it out")
        start = PLAIN_INT8 if recipe == "plain" else CalibrateOptions()
        axes = {"target": target} if recipe == "plain" else {"target": target, "recipe": recipe}
        options = stated(at, lambda: changed(start, {**changes, **axes}))
        options = self._with_paths(options, at)
        stated(at, lambda: options.runtime)  # reads the file of costs
        return options

    def _variants(self, own: Mapping[str, Any], at: str) -> dict[str, Mapping[str, Any]]:
        """Return the variants of a net by name; without any, one without a name."""
        known = table_of(self.content, "variants", self.where)
        for name, table in known.items():
            check_name(name, f"{self.where}: [variants.{name}]")
            if not isinstance(table, dict):
                raise ConfigError(f"{self.where}: [variants.{name}]: expected a table")
        if not known and "variants" not in own:
            return {"": {}}
        taken = self._list(own, "variants", tuple(known), list(known), at, of_file=False)
        return {name: known[name] for name in taken}

    def _engine(self, own: Mapping[str, Any], at: str) -> EnginePlan | None:
        if own.get("engine", self.content.get("engine", False)) is False:
            return None
        given = {**_engine_table(self.content, self.where), **_engine_table(own, at)}
        table = dict(given)
        here = f"{at} engine"
        placement = changed_at(here, Placement(gpus=1), table.pop("placement", {}))
        accelerators = table.pop("accelerators", [placement.accelerator_type])
        kinds = str if "accelerators" in given else (str, type(None))
        named = isinstance(accelerators, list) and accelerators
        if not named or not all(isinstance(entry, kinds) for entry in accelerators):
            raise ConfigError(
                f"{here}: accelerators: got {accelerators!r}, expected a list of types of GPU"
            )
        return EnginePlan(changed_at(here, BuildOptions(), table), tuple(accelerators), placement)

    def _options(self, own: Mapping[str, Any], key: str, start: T) -> T:
        """Return options of a net: the defaults, those of the file, its own."""
        at = f"{self.where}: [{key}]"
        table = {**table_of(self.content, key, self.where), **table_of(own, key, self.where)}
        return self._with_paths(changed_at(at, start, table), at)

    def _images(self, own: Mapping[str, Any], key: str, at: str, otherwise: Path | None) -> Path:
        value = own.get(key, self.content.get(key))
        if value is None:
            if otherwise is None:
                raise ConfigError(
                    f"{at}: {key}: is missing; give the images of calibration, here or for all nets"
                )
            return otherwise
        path = self._path(value, f"{at}: {key}")
        if not stated(f"{at}: {key}", lambda: count_images(path)):
            raise ConfigError(f"{at}: {key}: {path}: holds no images")
        return path

    def _list(
        self,
        own: Mapping[str, Any],
        key: str,
        choices: tuple[str, ...],
        default: list[str],
        at: str,
        *,
        of_file: bool = True,
    ) -> list[str]:
        value = own.get(key, self.content.get(key, default) if of_file else default)
        if not isinstance(value, list) or not value:
            raise ConfigError(f"{at}: {key}: got {value!r}, expected a list of names")
        for entry in value:
            if entry not in choices:
                raise ConfigError(
                    f"{at}: {key}: got {entry!r}, expected of {', '.join(choices) or 'none'}"
                )
        return list(dict.fromkeys(value))

    def _path(self, value: Any, at: str) -> Path:
        if not isinstance(value, str):
            raise ConfigError(f"{at}: got {value!r}, expected a path")
        return self.folder / value

    def _with_paths(self, options: T, at: str) -> T:
        """Return options whose paths start from the folder of the file, and exist."""
        assert is_dataclass(options)
        assert not isinstance(options, type)
        located = {}
        for item in fields(options):
            value = getattr(options, item.name)
            if isinstance(value, Path):
                located[item.name] = path = self.folder / value
                if not path.exists():
                    raise ConfigError(f"{at}: {item.name}: {path}: does not exist")
        return replace(options, **located) if located else options


def _engine_table(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the options of engines; true stands for none, false for no engine."""
    is_switch = isinstance(content.get("engine"), bool)
    return {} if is_switch else table_of(content, "engine", where)
