"""The pipeline as functions: plan, tune, sweep, evaluate, compress, export, measure, serve, chat; `open` looks a name up.

    plan = fleetune.plan("smollm2-135m", ram="2GB", uplink="1Mbps")
    run = fleetune.tune("smollm2-135m", "demo", method="fedkseed", rounds=2)
    small = fleetune.compress(run, settings={"bits": 4})
    file = fleetune.export(small, to="gguf")
    table = fleetune.measure(small, kept_gain=True)

The commands of the same names call these.  A model may be a name, a path, the number of a run or compression, `latest`,
or a result of `tune` or `compress`; `plan`, `tune` and `sweep` start from a plain model.
Every function raises a class of `fleetune.errors` whose message says what failed and whose hint says what to do.
With `offline` the network is never used; `out` is the folder of the runs.

A function that takes long prints lines while it works where a person reads them: standard output is a terminal or a
notebook.  `progress=False` prints nothing, `progress=True` prints in a pipe too.  A `listener` is called with events,
remarks and progress instead (`runs/listener.py`).  Remarks of what is silent go to the log `fleetune`.
"""
