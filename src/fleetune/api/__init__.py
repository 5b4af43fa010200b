"""The pipeline as functions: plan, tune, sweep, evaluate, compress, export, measure, serve, chat; `open` looks a name up.

A model may be a name, a path, the number of a run or compression, `latest`, or a result of `tune` or `compress`; `plan`, `tune`
and `sweep` start from a plain model.  With `offline` the network is never used; `out` is the folder of the runs.

A function that takes long prints lines where a person reads them (a terminal or a notebook); `progress=True` prints in a pipe
too.  A `listener` gets events, remarks and progress instead (`runs/listener.py`).  Other remarks go to the log `fleetune`.
"""
