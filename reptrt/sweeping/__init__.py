"""Many nets x targets x recipes, with a record of what is finished: `sweep`.

sheet        what is to be done, as values; reading   from a TOML file (checking)
store        results by what they depend on, in a folder or behind a URL (places)
tasks        a piece of work, where it may run, and who runs it: the protocol of executors
local        worker processes on this machine (worker is such a process); on_ray   a Ray cluster
schedule     keeps an executor busy and repeats what died
work         what a worker does: export, a trial (calibrate, lint, eval), an engine
planning     the keys of all results, and which of them are there
sweeping     the sweep; record   sweep.json; report   what is printed, and report.html
"""
