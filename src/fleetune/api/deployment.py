# SPDX-License-Identifier: Apache-2.0
"""Take a model to the device: export, measure, serve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune import subject as subjects
from fleetune.api.arguments import Rows, words
from fleetune.errors import UsageError
from fleetune.models import adapter_folder
from fleetune.runs.listener import Listener
from fleetune.runs.progress import heard_by

if TYPE_CHECKING:
    from fleetune.deploy.export_subject import ExportResult
    from fleetune.deploy.measure.job import MeasureResult
    from fleetune.deploy.serving.session import Session


def export(
    model: object,
    *,
    to: str | None = None,
    path: str | Path | None = None,
    text: str | Path | None = None,
    push: str | None = None,
    private: bool = False,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> ExportResult:
    """Write a model for a runtime, and read it back; of PEFT's adapter in a folder: to gguf:lora or peft.

    `to` is a target (`fleetune.targets()`; default `gguf`; for a run `hf`), `path` a new file or folder (default: in the
    folder of the run or compression; of a plain model here).  With a text file `text`, the perplexity of the source in
    torch and of the written file in its runtime are compared.  With `push`, OWNER/NAME, what was written goes to that
    model repository on the Hub, which is made (`private` or not) if it is not there.
    """
    from fleetune.deploy import export_subject

    place, words, watching = (
        Path(path) if path else None,
        str(text) if text else None,
        heard_by(listener, progress),
    )
    export_subject.check(to, place, words)
    to_hub = export_subject.destination(push, private=private, offline=offline)
    if (adapter := adapter_folder.of_peft(model)) is not None:
        done = export_subject.of_adapter(adapter, to, place, watching, offline=offline)
    else:
        found = subjects.open(model, out=out)
        done = export_subject.export(found, to, place, words, watching, offline=offline)
    return export_subject.pushed(done, to_hub, watching) if to_hub else done


def measure(
    *models: object,
    text: str | Path | None = None,
    windows: int = 16,
    length: int = 512,
    data: Rows | None = None,
    limit: int = 200,
    tasks: Sequence[str] = (),
    answer_tokens: int = 96,
    labels: Sequence[str] = (),
    threads: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 3,
    kept_gain: bool = False,
    reference: object | None = None,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> MeasureResult:
    """Measure size, speed, memory and quality of models side by side, each in a process of its own.

    For a compression, three models are measured: base, tuned, compressed (without tuned if it was never tuned).  Models
    are run in torch, exported .gguf files in llama.cpp, a model that is a .gguf file in both.  With several models, only
    the last stage of each is measured, in torch and as its exported files.  `kept_gain` also compresses the base in the
    same way, to find what share of the improvement from tuning survives.  With a model `reference`, every model is compared
    with it: KL divergence of the next-token distributions (nats a token) and same top token (percent), on the windows of
    `text`, else on the rows' answers; a compressed model is compared with what it was made from without being asked.
    """
    from fleetune.deploy.measure import job

    found = [
        subjects.open(model, out=out) for model in models
    ]  # what is no model is refused before torch is imported
    if kept_gain and found:
        job.check_kept(found)
    from fleetune.tuning import objects_to_files

    options = job.MeasureOptions(
        text=str(text) if text else None, windows=windows, length=length,
        data=objects_to_files.data_name(data, Path(out)) or None, limit=limit, tasks=tuple(words(tasks)),
        answer_tokens=answer_tokens, labels=tuple(words(labels)),
        threads=threads, prompt_tokens=prompt_tokens,
        new_tokens=new_tokens, repeats=repeats, kept_gain=kept_gain,
    )  # fmt: skip
    if not models:
        raise UsageError("measure needs a model", hint="give one or more names, paths or results")
    dense = subjects.open(reference, out=out) if reference is not None else None
    return job.measure(found, options, heard_by(listener, progress), reference=dense, offline=offline)


@contextmanager
def serve(
    model: object,
    *,
    engine: str = "auto",
    threads: int | None = None,
    context: int = 4096,
    host: str = "127.0.0.1",
    port: int = 8080,
    token: str | None = None,
    beside_base: bool = False,
    out: str | Path = "runs",
    offline: bool = False,
    listener: Listener | None = None,
    progress: bool | None = None,
) -> Iterator[Session]:
    """Serve a model over an OpenAI-compatible endpoint and a chat page while the block runs.

    `engine` is a name or auto (the first installed); without `threads`, several counts are tried and the fastest is
    used; `port` 0 takes any free one.  A client must present `token` if one is given; on a `host` beyond this machine one
    is always needed, and made where none is given.  With `beside_base` the base model is served as well, in a second
    engine with memory of its own: a request goes to the one that it names.
    """
    from fleetune.deploy.serving import session

    with session.served(
        subjects.open(model, out=out), session.EngineOptions(engine, threads, context),
        session.FrontOptions(host, port, token), heard_by(listener, progress), offline=offline, beside_base=beside_base,
    ) as opened:  # fmt: skip
        yield opened
