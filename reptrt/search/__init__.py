"""The search for the cheapest INT8 file that meets a bound on accuracy, and its record.

options      what is asked for
candidates   what may be tried: a form of the net (how it is split, what stays in float) and a
             recipe (how much work is spent on its constants)
halving      which candidates go on to more images, and which of them are on the Pareto front
trials       a candidate as a file, with its record; nothing that is finished is done again
judging      what a file loses on some images, with an interval
latency      what a file costs where it will run: measured, or by a model
tuning       the search
record       tune.json; report    what is printed, and report.html
"""
