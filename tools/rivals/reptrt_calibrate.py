"""Reptrt's own calibrate, under the same conditions as the other tools.

Options: ``recipe``, ``max_overhead``, ``target``, and ``plain`` for plain INT8 without preparation.
"""

from dataclasses import replace

from job import Job, run

from reptrt.pipeline import PLAIN_INT8, CalibrateOptions, calibrate


def options_of(job: Job) -> CalibrateOptions:
    """Return the options of calibrate for a job."""
    images = len(job.array())
    if job.options.get("plain"):
        return replace(PLAIN_INT8, images=images)
    default = CalibrateOptions()
    return CalibrateOptions(
        images=images,
        recipe=job.options.get("recipe", default.recipe),
        max_overhead=job.options.get("max_overhead", default.max_overhead),
        target=job.options.get("target", default.target),
    )


def quantize(job: Job) -> None:
    """Write the INT8 file of a job."""
    calibrate(job.model, job.images, job.output, options_of(job))


if __name__ == "__main__":
    run(quantize)
