"""The functions of ``import reptrt``: what a program may pass, and what it gets back.

    networks   what stands for a network: a path, a model in memory
    stages     export, calibrate, lint, build_engine, package
    judging    evaluate, predict, bench, diagnose, rank_layers, inspect
    folders    run, report, ladder: the whole way, and what is said of it
    searching  tune, sweep

Each function turns its arguments into the values that the rooms below take, and calls one of them.
Keyword arguments that change options are the fields of the options dataclasses (`core.keywords`).
"""
