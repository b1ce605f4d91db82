"""``reptrt build-engine``, ``inspect`` and ``package``."""

from pathlib import Path
from typing import Any

import click

from reptrt.cli.command import Command, emit
from reptrt.cli.fields import PATH, FieldOptions

_BUILD = FieldOptions("reptrt.trt.options:BuildOptions")
_PACKAGE = FieldOptions("reptrt.trt.options:PackageOptions")


@click.command("build-engine", cls=Command, options=[_BUILD])
@click.argument("model", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Engine file to write.")
def build_engine(model: Path, output: Path, json_path: str | None, **values: Any) -> None:
    """Build a TensorRT engine from the ONNX file MODEL.

    With tensorrt-rtx this needs neither a GPU nor a driver.
    """
    from reptrt.trt.build import build_engine as build

    summary = build(model, output, _BUILD.value(values))
    emit(str(summary), summary.to_dict(), json_path)


@click.command(cls=Command)
@click.argument("file", type=PATH)
@click.option(
    "--audit", is_flag=True, help="List the layers of an engine that should be INT8 and are not."
)
@click.option(
    "--plan",
    type=PATH,
    help="Q/DQ file that says which layers should be INT8; default: the engine's sidecar.",
)
@click.option(
    "--strict", is_flag=True, help="Audit, and exit with 1 if a layer should be INT8 and is not."
)
def inspect(
    file: Path, audit: bool, plan: Path | None, strict: bool, json_path: str | None
) -> None:
    """Show the layers of FILE and the precision of each.

    FILE is an ONNX file or an engine. An engine of tensorrt-rtx is read without a GPU, one of
    tensorrt on the GPU it was built for.
    """
    from reptrt.core.result import text_of
    from reptrt.trt.audit import audit as check
    from reptrt.trt.inspect import inspect as look

    audited = check(file, plan) if audit or strict or plan is not None else None
    inspection = look(file)
    counts = "  ".join(f"{kind} {n}" for kind, n in inspection.precisions.items())
    lines = [text_of(inspection.to_table()), f"inspect  {file}  {counts}"]
    lines += audited.to_lines() if audited is not None else []
    content = inspection.to_dict() | ({} if audited is None else {"audit": audited.to_dict()})
    emit("\n".join(lines), content, json_path)
    if strict and audited is not None and audited.misses:
        click.get_current_context().exit(1)


@click.command(cls=Command, options=[_PACKAGE])
@click.argument("file", type=PATH)
@click.option(
    "-o",
    "--output",
    type=PATH,
    required=True,
    help="Model repository, created if it does not exist; or, with --nms, an .onnx file to write.",
)
def package(file: Path, output: Path, json_path: str | None, **values: Any) -> None:
    """Pack FILE, an engine or an ONNX file, for the machine that serves it.

    It becomes a model of Triton Inference Server, with a configuration that fits it. A detector
    can get its NMS here; if OUTPUT ends in .onnx, just that file is written.
    """
    from reptrt.trt.package import package as write

    report = write(file, output, _PACKAGE.value(values))
    if report.warning is not None:
        click.echo(f"warning: {report.warning}", err=True)
    text = (
        f"package  {report.path}  for {report.platform}  batch {report.max_batch_size or 'fixed'}"
    )
    emit(text, report.to_dict(), json_path)
