"""Options of export and calibrate."""

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reptrt.core.choices import (
    OPSETS,
    HighPrecision,
    Recipe,
    Resize,
    Rounding,
    SplitForm,
    SplitMode,
    SplitPrecision,
    TargetName,
    TorchDevice,
)
from reptrt.core.errors import ConfigError, option
from reptrt.core.option_fields import check_bounds, described, require_at_least
from reptrt.pipeline.recipes import RECIPES, Parts
from reptrt.quantize.calib.options import ThresholdOptions
from reptrt.quantize.reconstruct.options import LearnOptions
from reptrt.quantize.targets import TARGETS, Target
from reptrt.quantize.targets.measured import costs_from_check

if TYPE_CHECKING:
    from reptrt.core.grid import Grid

LEFT_BY_COMPENSATION = 0.25  # of the weight noise of nearest rounding: 6 dB less on RepVGG nets
_AUTO = re.compile("auto(:.*)?")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options of `export`; None means what the source implies."""

    input_size: tuple[int, int, int] | None = described(
        None, "Channels, height and width of an image, e.g. 3x224x224."
    )
    mean: tuple[float, ...] | None = described(None, "Mean of each channel, of pixels in 0..1.")
    std: tuple[float, ...] | None = described(
        None, "Standard deviation of each channel, of pixels in 0..1."
    )
    resize: Resize | None = described(
        None, "What to do with images of another size than the input's."
    )
    opset: int = described(
        19,
        "Opset of the ONNX file; scales in FP16 need 19.",
        minimum=min(OPSETS),
        maximum=max(OPSETS),
    )
    tolerance: float = described(
        1e-4,
        "Largest difference that fusion may make to any block or output, as a fraction of its "
        "largest value.",
        minimum=0,
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.input_size is not None and min(self.input_size) < 1:
            raise ConfigError(
                f"{option('input_size')}: got {self.input_size}, expected positive numbers"
            )


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """Options of `calibrate`."""

    images: int = described(
        512,
        "Number of calibration images, sampled from the data by --seed; by default fewer "
        "if the data has fewer.",
        short="-n",
    )
    target: TargetName = described(
        "tensorrt",
        "Runtime that the file is made for, which decides what runs in INT8 and what it costs: "
        "tensorrt (NVIDIA GPUs), onnxruntime (CPUs).",
    )
    costs: Path | None = described(
        None,
        "File of tools/gpu_check.py whose measurements replace the assumed costs of the target "
        "tensorrt.",
    )
    measure: bool = described(
        False,
        "Choose splits by what they cost in onnxruntime on this machine: each form of each layer "
        "is timed, and the times are kept; for the target onnxruntime.",
    )
    recipe: Recipe = described(
        "fast",
        "How much work is spent on accuracy: fast rounds weights in closed form (gptq), balanced "
        "and accurate learn the rounding, accurate for longer. Or the method of a paper and no "
        "more: cfws (2312.10588), repapq (2402.16121). Other options override what a recipe says.",
    )
    threshold: ThresholdOptions = field(default_factory=ThresholdOptions)
    equalize: bool | None = described(
        None,
        "Scale the channels of activations so that weights and activations lose less; adds no "
        "work to the net; default: on, off for the recipes cfws and repapq.",
    )
    split: SplitMode | None = described(
        None,
        "Sum of two layers that replaces a layer whose weights lose too much: identity (a scaled "
        "identity and the rest; identity-scalar: one factor for all channels), coarse-fine (large "
        "steps and small steps), none; auto decides for each layer; default: auto, coarse-fine for "
        "the recipe cfws, none for repapq.",
    )
    split_precision: SplitPrecision | None = described(
        None,
        "Precision of the two summands of a split layer; default: that which the target adds "
        "fastest, float for tensorrt, int8 for onnxruntime; always float for the recipe cfws.",
    )
    max_overhead: float = described(
        0.10,
        "Extra multiply-accumulates that --split auto may add, as a fraction of the net's own; "
        "0: no extra node.",
    )
    full_range: bool | None = described(
        None,
        "Let activations after a ReLU use all 256 codes where that pays; default: on, off for the "
        "recipes cfws and repapq.",
    )
    correct_bias: bool | None = described(
        None,
        "Subtract the mean error of quantized weights from the biases; default: on, off for the "
        "recipes cfws and repapq.",
    )
    rounding: Rounding | None = described(
        None,
        "How weights are rounded: nearest; gptq, where the errors of the inputs of a layer "
        "compensate each other; learned, which starts near gptq; adaround, learned from nearest; "
        "default: gptq for the recipe fast, learned for balanced and accurate, nearest for cfws, "
        "adaround for repapq.",
    )
    qprep: bool | None = described(
        None,
        "Learn a gain and a shift for each channel of an activation; default: only where the "
        "recipe learns (balanced, accurate, repapq).",
    )
    keep_affine: bool = described(
        False, "Leave the learned gains and shifts in the graph as Mul and Add, for inspection."
    )
    iterations: int | None = described(
        None,
        "Learning steps for each unit, a block of layers that are learned together; default: "
        "40 for the recipe balanced, 100 for accurate and repapq.",
        minimum=1,
    )
    memory_budget: float = described(
        4.0,
        "Memory in GiB that the process may use; half of it may keep values from the first pass "
        "over the images. Activations that do not fit while learning are stored in half "
        "precision, or on disk.",
    )
    learn: LearnOptions | None = None  # in place of all that the recipe says; for experiments
    weight_bits: int = described(8, "Bits of a weight, 2 to 8; fewer than 8 are simulated in INT8.")
    activation_bits: int = described(
        8, "Bits of an activation, 2 to 8; fewer than 8 are simulated in INT8."
    )
    exclude: tuple[str, ...] = described(
        (),
        "Layers (convolutions, matrix products) that stay in float: a regular expression, which "
        "may match anywhere in the name; may be given several times.",
        metavar="REGEX",
    )
    float_nodes: tuple[str, ...] = described(
        (),
        "Nodes of any kind that stay in float, and with them everything that is reached only "
        "through them: a regular expression, as for --exclude; may be given several times. auto:N: "
        "up to N layers, those that cost most, where float pays.",
        metavar="REGEX|auto:N",
        flag="--float",
    )
    high_precision: HighPrecision = described(
        "fp32",
        "Type in the file of everything that is not INT8; building an engine turns fp32 into fp16 "
        "anyway, unless it is told not to.",
    )
    device: TorchDevice = described("cpu", "Device that calibration images are run on.")
    seed: int = described(0, "Seed for sampling calibration images and for learning.", minimum=0)

    def __post_init__(self) -> None:
        check_bounds(self)
        for name in ("weight_bits", "activation_bits"):
            if not 2 <= (bits := getattr(self, name)) <= 8:
                raise ConfigError(f"{option(name)}: got {bits}, expected 2..8 (simulated in INT8)")
        parts = self.parts
        if parts.equalize and self.summands == "int8" and parts.split == "coarse-fine":
            raise ConfigError(
                f"{option('split', 'coarse-fine')}, {option('split_precision', 'int8')}: the "
                "summands lie before the ReLU, where equalized channels have no common range; give "
                f"{option('equalize', False)} too, or {option('split_precision', 'float')}"
            )
        if self.iterations is not None and parts.learn is None and self.learning is None:
            raise ConfigError(
                f"{option('iterations')}: nothing is learned with {option('recipe', self.recipe)}; "
                f"give {option('recipe', 'balanced')} or {option('recipe', 'accurate')} too"
            )
        if self.keep_affine and (self.learning is None or not self.learning.affine):
            raise ConfigError(
                f"{option('keep_affine')}: no gains and shifts are learned; give "
                f"{option('qprep', True)} too, or a recipe that learns"
            )
        if self.costs is not None and self.target != "tensorrt":
            raise ConfigError(
                f"{option('costs')}: {self.costs} holds measurements of TensorRT; drop it with "
                f"{option('target', self.target)}"
            )
        if self.measure and self.target == "tensorrt":
            raise ConfigError(
                f"{option('measure', True)}: layers are timed in onnxruntime, which says nothing "
                f"about {option('target', 'tensorrt')}; run tools/gpu_check.py on the GPU and give "
                f"its file with {option('costs')}"
            )
        _ = self.most_float_layers
        require_at_least(1, self, "images")
        require_at_least(0, self, "max_overhead")
        if not 0 < self.memory_budget < float("inf"):
            got = self.memory_budget
            raise ConfigError(f"{option('memory_budget')}: got {got}, expected GiB above 0")

    @property
    def parts(self) -> Parts:
        """What the recipe says, and in its place the options that are given."""
        recipe = RECIPES[self.recipe]
        given = {item.name: getattr(self, item.name) for item in fields(Parts)}
        given["threshold"] = replace(
            self.threshold, rule=self.threshold.rule or recipe.threshold.rule
        )
        return replace(recipe, **{name: v for name, v in given.items() if v is not None})

    @property
    def without_learning(self) -> "CalibrateOptions":
        """The same options where everything is left out that is learned."""
        rounding: Rounding = "gptq" if self.compensates else "nearest"
        parts = replace(self.parts, rounding=rounding, qprep=False, learn=None)
        given = {item.name: getattr(parts, item.name) for item in fields(Parts)}
        return replace(self, recipe="fast", keep_affine=False, iterations=None, **given)

    @property
    def float_patterns(self) -> tuple[str, ...]:
        """The regular expressions of ``float_nodes``."""
        return tuple(entry for entry in self.float_nodes if not _AUTO.fullmatch(entry))

    @property
    def most_float_layers(self) -> int | None:
        """N of ``auto:N`` in ``float_nodes``; None: there is none."""
        entries = [entry for entry in self.float_nodes if _AUTO.fullmatch(entry)]
        if not entries:
            return None
        number = entries[0].partition(":")[2]
        if len(entries) > 1 or not number.isdecimal() or int(number) < 1:
            raise ConfigError(
                f"{option('float_nodes', ', '.join(entries))}: expected auto:N once, with N of 1 "
                "or more: the number of layers that may stay in float"
            )
        return int(number)

    @property
    def runtime(self) -> Target:
        """What the target is known to run, and at which cost."""
        target = TARGETS[self.target]
        if self.costs is None:
            return target
        return replace(target, costs=costs_from_check(self.costs, target.costs))

    @property
    def summands(self) -> SplitPrecision:
        """The precision of the summands of split layers."""
        return self.parts.split_precision or TARGETS[self.target].precision

    @property
    def split_form(self) -> SplitForm:
        """The form into which every layer is split that can be; "none" for ``auto``.

        Where the summands are INT8, an identity split uses one factor for the whole layer, so that
        the identity is not rounded a second time.
        """
        split = self.parts.split
        if split == "auto":
            return "none"
        if split == "identity" and self.summands == "int8":
            return "identity-scalar"
        return split

    @property
    def learning(self) -> LearnOptions | None:
        """What is learned after nearest rounding; None: nothing."""
        if self.learn is not None:
            return self.learn
        parts = self.parts
        rounding = parts.rounding in ("learned", "adaround")
        if not (rounding or parts.qprep):
            return None
        base = parts.learn or LearnOptions()
        return replace(
            base,
            correct=parts.rounding == "learned",
            weighted=parts.rounding == "learned",
            rounding=rounding,
            affine=parts.qprep,
            iterations=base.iterations if self.iterations is None else self.iterations,
            memory_budget=int(self.memory_budget * 2**30),
            seed=self.seed,
        )

    @property
    def remaining(self) -> float:
        """The part of the weight noise that is left when the weights are rounded."""
        return LEFT_BY_COMPENSATION if self.compensates else 1.0

    @property
    def compensates(self) -> bool:
        """Whether codes are chosen so that their errors compensate each other."""
        return self.parts.rounding in ("gptq", "learned")

    @property
    def kept_bytes(self) -> int:
        """How much of the values of the first pass over the images may be kept."""
        return int(self.memory_budget * 2**29) if self.device == "cpu" else 0

    @property
    def grids(self) -> "tuple[Grid, Grid]":
        """The codes of activations and of weights."""
        from reptrt.core.grid import Grid  # loads numpy, which the options themselves do without

        return Grid.activation(self.activation_bits), Grid.weight(self.weight_bits)

    @property
    def is_auto(self) -> bool:
        """Whether the rule for thresholds is chosen by its effect on the outputs."""
        return self.parts.threshold.is_auto

    @property
    def simulation(self) -> str | None:
        """Why the result is a simulation that no engine can run; None if it is not."""
        if self.weight_bits == self.activation_bits == 8:
            return None
        return f"{self.weight_bits}-bit weights, {self.activation_bits}-bit activations inside INT8"


PLAIN_INT8 = CalibrateOptions(
    threshold=ThresholdOptions("max"),
    equalize=False,
    split="none",
    full_range=False,
    correct_bias=False,
    rounding="nearest",
)
"""Plain quantization, which knows nothing of branches: thresholds at maxima, nearest codes."""
