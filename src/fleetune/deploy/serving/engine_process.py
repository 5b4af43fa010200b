# SPDX-License-Identifier: Apache-2.0
"""Run an engine of a Python package in this process: `python -m fleetune.deploy.serving.engine_process KIND MODEL PORT ..`.

It ends when its standard input does, so it does not outlive the Fleetune that started it, however that ended.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from fleetune.deploy.serving.engines import KEY, LOOPBACK, LaunchOptions


def main(argv: Sequence[str]) -> None:
    """Serve until killed."""
    kind, model, port, threads, context = argv
    threading.Thread(target=_end_with_parent, daemon=True).start()
    options = LaunchOptions(Path(model).resolve(), int(port), int(threads), int(context))
    {"xllamacpp": _xllamacpp, "transformers": _transformers}[kind](options)


def _end_with_parent() -> None:
    # not through sys.stdin: a Python that ends while a thread waits in it does so with a crash, not with its error
    while os.read(0, 1 << 12):
        pass
    os._exit(0)


def _xllamacpp(options: LaunchOptions) -> None:
    """Run llama.cpp's server for one conversation at a time, without its own page and without CORS."""
    package = importlib.import_module("xllamacpp")
    params = package.CommonParams()
    params.model.path, params.model_alias = str(options.model), {options.model.name}
    params.hostnames, params.port = [LOOPBACK], options.port
    params.api_keys = [os.environ[KEY]]
    params.n_ctx, params.n_parallel = options.context, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.ui, params.endpoint_slots, params.cors_origins = False, False, ""
    params.verbosity = 2  # warnings and errors
    server = package.Server(params)  # returns when the model is loaded; ends when it is let go
    threading.Event().wait()
    del server


def _transformers(options: LaunchOptions) -> None:
    """Run transformers' server, pinned to the one directory and named after it."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(options.threads)
    os.chdir(options.model.parent)  # the name that it goes by is then that of the folder, not its whole path
    importlib.import_module("transformers.cli.serve").Serve(
        force_model=options.model.name, host=LOOPBACK, port=options.port
    )


if __name__ == "__main__":
    main(sys.argv[1:])
