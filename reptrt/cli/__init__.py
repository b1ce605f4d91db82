"""The command line: thin calls to the Python API, one file per family of commands.

    export     export
    calibrate  calibrate, lint
    engine     build-engine, inspect, package
    judge      eval, predict, diagnose, bench
    runs       run, report, ladder, replay, diff
    search     tune
    sweep      sweep

Results go to stdout, progress and logs to stderr. Exit status 0: done; 1: a stated failure, in one
line; 2: wrong usage; 130: Ctrl-C. Nothing heavy is imported before a command runs.
"""

from reptrt.cli.calibrate import calibrate, lint
from reptrt.cli.engine import build_engine, inspect, package
from reptrt.cli.export import export
from reptrt.cli.group import main
from reptrt.cli.judge import bench, diagnose, evaluate, predict
from reptrt.cli.runs import diff, ladder, replay, report, run
from reptrt.cli.search import tune
from reptrt.cli.sweep import sweep

__all__ = ["main"]

for _command in (
    export,
    calibrate,
    lint,
    build_engine,
    inspect,
    package,
    evaluate,
    predict,
    diagnose,
    bench,
    run,
    report,
    ladder,
    replay,
    diff,
    tune,
    sweep,
):
    main.add_command(_command)
