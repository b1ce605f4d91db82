"""The rows that are compared, one for each tool and setting, and the environments they need."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The number for each layer that AIMET's documentation recommends for 8-bit weights.
ADAROUND_ITERATIONS = 10_000


@dataclass(frozen=True, slots=True)
class Environment:
    """Packages that a rival gets in a virtual environment of its own."""

    name: str
    packages: tuple[str, ...]
    without_dependencies: tuple[str, ...] = ()  # installed last, without their dependencies


@dataclass(frozen=True, slots=True)
class Row:
    """One tool with one setting."""

    name: str  # name of its files
    title: str  # title in the table
    runner: str  # script in this folder, without .py
    environment: Environment | None = None  # None: the current Python
    options: Mapping[str, Any] = field(default_factory=dict)
    mark: str = ""  # a footnote: why the row cannot be compared directly with the others

    @property
    def is_rival(self) -> bool:
        """Whether it is another tool's row."""
        return self.environment is not None


ORT = Environment("ort", ("numpy==2.4.6", "onnx==1.23.2", "onnxruntime==1.32.0", "sympy"))
NNCF = Environment(
    "nncf", ("nncf==3.4.0", "openvino==2026.4.1", "onnx==1.23.2", "onnxruntime==1.32.0")
)
AIMET = Environment("aimet", ("torch<2.14", "aimet-onnx==2.42.0", "onnxruntime==1.32.0"))
# The last release with ONNX; 3.x has PyTorch, TensorFlow and JAX only. It needs six, undeclared.
INC = Environment(
    "inc", ("neural-compressor==2.6", "numpy<2", "onnx==1.16.2", "onnxruntime==1.19.2", "six")
)
# The dependencies of nvidia-modelopt[onnx] without those that need CUDA: onnxruntime in place of
# onnxruntime-gpu, and no cupy.
MODELOPT = Environment(
    "modelopt",
    (
        *("torch<2.14", "onnx==1.21.0", "onnxruntime==1.24.4", "onnx-graphsurgeon>=0.6.1"),
        *("onnxconverter-common~=1.16.0", "onnxscript", "onnxslim>=0.1.76", "polygraphy>=0.53.4"),
        *("cppimport", "lief", "ml_dtypes", "ninja", "numpy", "nvidia-ml-py>=12", "packaging"),
        *("setuptools>=80", "tqdm", "PyYAML>=6", "omegaconf>=2.3", "pulp<4", "pydantic>=2"),
        *("regex", "rich", "safetensors", "scipy"),
    ),
    ("nvidia-modelopt==0.47.0",),
)
_FP8 = {"method": "max", "mode": "fp8"}
_FOR_FP8 = "FP8, for GPUs from SM89 on; its time on a CPU says nothing"
_FOR_CPUS_OURS = "made for CPUs; TensorRT gets a file of its own"
# modelopt.torch imports these two, which its metadata lists for torch.
MODELOPT_TORCH = Environment(
    "modelopt-torch",
    (*MODELOPT.packages, "requests", "huggingface_hub"),
    MODELOPT.without_dependencies,
)
_FOR_CPUS = "UINT8 activations, for CPUs; TensorRT refuses the file"


def rows(adaround_iterations: int = ADAROUND_ITERATIONS) -> tuple[Row, ...]:
    """Return all rows, in the order of the table."""
    return (*_ours(), *_ranges_only(), *_more_than_ranges(adaround_iterations), *_for_cpus())


def _ours() -> tuple[Row, ...]:
    name = "reptrt_calibrate"
    return (
        Row("reptrt-plain", "reptrt, nothing switched on", name, options={"plain": True}),
        Row("reptrt-fast-0", "reptrt fast --max-overhead 0", name, options={"max_overhead": 0.0}),
        Row("reptrt-fast", "reptrt fast", name, options={"recipe": "fast"}),
        Row("reptrt-balanced", "reptrt balanced", name, options={"recipe": "balanced"}),
        Row(
            "reptrt-accurate-0",
            "reptrt accurate --max-overhead 0",
            name,
            options={"recipe": "accurate", "max_overhead": 0.0},
        ),
        Row("reptrt-accurate", "reptrt accurate", name, options={"recipe": "accurate"}),
        Row(
            "reptrt-cpu",
            "reptrt fast --target onnxruntime",
            name,
            options={"recipe": "fast", "target": "onnxruntime"},
            mark=_FOR_CPUS_OURS,
        ),
    )


def _ranges_only() -> tuple[Row, ...]:
    return (
        *(
            Row(f"ort-{method.lower()}", f"onnxruntime {method}", "ort", ORT, {"method": method})
            for method in ("MinMax", "Entropy", "Percentile")
        ),
        *(
            Row(f"modelopt-{m}", f"ModelOpt {m}", "modelopt_onnx", MODELOPT, {"method": m})
            for m in ("max", "entropy")
        ),
        Row("modelopt-fp8", "ModelOpt FP8 (E4M3)", "modelopt_onnx", MODELOPT, _FP8, _FOR_FP8),
        *(
            Row(f"inc-{name}", f"Neural Compressor {name}", "inc", INC, {"algorithm": name})
            for name in ("minmax", "kl", "percentile")
        ),
    )


def _more_than_ranges(iterations: int) -> tuple[Row, ...]:
    equalized = {"equalize": True, "scheme": "tf_enhanced"}
    adaround = equalized | {"adaround": iterations}
    return (
        Row("aimet-cle-minmax", "AIMET CLE, min_max", "aimet", AIMET, {"equalize": True}),
        Row("aimet-cle", "AIMET CLE, tf_enhanced", "aimet", AIMET, equalized),
        Row("aimet-adaround", f"AIMET CLE, AdaRound {iterations:,}", "aimet", AIMET, adaround),
    )


def _for_cpus() -> tuple[Row, ...]:
    unsigned = {"method": "MinMax", "unsigned": True}
    return (
        Row("ort-uint8", "onnxruntime MinMax, UINT8", "ort", ORT, unsigned, _FOR_CPUS),
        Row("nncf", "NNCF, fast bias correction", "nncf_onnx", NNCF, {}, _FOR_CPUS),
        Row(
            "nncf-accurate",
            "NNCF, accurate bias correction",
            "nncf_onnx",
            NNCF,
            {"accurate": True},
            _FOR_CPUS,
        ),
    )


def tuners(options: Mapping[str, Any]) -> tuple[Row, ...]:
    """Return the rows that search for a file that meets a bound on accuracy."""
    return (
        Row("nncf-control", "NNCF accuracy control", "nncf_accuracy", NNCF, options),
        Row("modelopt-auto", "ModelOpt auto_quantize", "modelopt_auto", MODELOPT_TORCH, options),
    )
