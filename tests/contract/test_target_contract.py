"""The contract, every export target x every property; the target of docs/export.md is one of them, from another package."""

import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from deploy_harness import changed, compressed, on_codebook, on_grid, tiny
from deploy_harness import write_codes as write

from fleetune import adapters, models
from fleetune.cli.main import main
from fleetune.common import registry
from fleetune.compression.layerwise.grids import Grid, rounded
from fleetune.deploy import targets
from fleetune.deploy.checkpoint import open_checkpoint
from fleetune.deploy.export import write as export
from fleetune.deploy.export import write_adapter as export_adapter
from fleetune.deploy.formats import Report
from fleetune.errors import StorageError, UsageError
from fleetune.models import artefact
from fleetune.models.artefact import Quantised
from fleetune.models.families import widths
from fleetune.models.families.number_types import SUPER_TYPES

EXAMPLE = Path(__file__).parent.parent.parent / "docs" / "export.md"
NAMES = [*targets.every(), "npz"]
FIRST = ["npz", *{target.format.module: name for name, target in reversed(targets.every().items())}.values()]
KINDS = ("gguf:q8_0", "gguf:f16")
OF_MODELS = [n for n in (*FIRST, *KINDS) if n == "npz" or targets.find(n).takes != "adapter"]
MADE = {"fleetune.method": "a-method-of-the-contract"}
TAKEN: dict[str, set[str]] = {}  # the targets that hints named for a source, and that did hold it
every = pytest.mark.parametrize("to", NAMES)
each_format = pytest.mark.parametrize("to", FIRST)  # one target of each


@pytest.fixture(autouse=True)
def npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that another package registers: the example of docs/export.md."""
    (code,) = re.findall(r"```python\n(.*?)```", EXAMPLE.read_text(encoding="utf-8"), re.S)
    package = tmp_path / "package"
    package.mkdir()
    (package / "npz_example.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(package))
    own = registry.entry_points
    point = EntryPoint("npz", "npz_example", targets.FORMATS.group)

    def entry_points(group: str) -> list[EntryPoint]:
        return [*own(group=group), *([point] if group == point.group else [])]

    monkeypatch.setattr(registry, "entry_points", entry_points)


def projections(model: models.Model, make: Callable[[Any], Quantised]) -> dict[str, Quantised]:
    return {n: make(t) for n, t in models.named_tensors(model.net) if n.endswith("proj.weight")}


def matrices(model: models.Model, bits: int = 4, group: int = 32) -> dict[str, Quantised]:
    return projections(model, lambda t: on_grid(t, bits, group))


def mixed(model: models.Model) -> dict[str, Quantised]:
    name = "model.layers.1.mlp.down_proj.weight"
    return {**matrices(model), name: on_grid(dict(models.named_tensors(model.net))[name], 8, 32)}


def in_super_blocks(kind: str) -> tuple[models.Model, dict[str, Quantised]]:
    model = tiny(hidden_size=256, intermediate_size=256, head_dim=64)
    return model, projections(model, lambda t: rounded(t, Grid(kind, SUPER_TYPES[kind].bits), 32))


def narrowed(kind: str) -> models.Model:
    model = tiny(kind)
    widths.cut(model.net, [widths.KeptUnits([0, 1], range(128)), widths.KeptUnits([1], range(16, 112))])
    return model


# Models that some targets hold and others do not
ODD: dict[str, Callable[[], tuple[models.Model, dict[str, Quantised]]]] = {
    "plain": lambda: (tiny(), {}),
    "4 bits": lambda: ((m := tiny()), matrices(m)),
    "positive scales": lambda: (
        (m := tiny()),
        projections(m, lambda t: rounded(t, Grid("symmetric", 4), 32)),
    ),
    "5 bits": lambda: ((m := tiny()), matrices(m, 5, 64)),
    "zeros of 0": lambda: ((m := tiny()), {n: changed(q, zero=q.zero * 0) for n, q in matrices(m).items()}),
    "a codebook": lambda: ((m := tiny()), projections(m, lambda t: on_codebook(t, 4, 32))),
    **{f"super-blocks of {kind}": partial(in_super_blocks, kind) for kind in SUPER_TYPES},
    "two kinds of grids": lambda: ((m := tiny()), mixed(m)),
    "a quantised embedding": lambda: (
        (m := tiny("qwen2")),
        matrices(m) | {"model.embed_tokens.weight": on_grid(m.net.model.embed_tokens.weight, 4, 32)},
    ),
    "a plain model of different widths": lambda: (narrowed("qwen3"), {}),
    "codes of different widths": lambda: ((m := narrowed("llama")), matrices(m)),
    "an activation": lambda: ((m := tiny(hidden_act="gelu")), matrices(m)),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders: a compressed and a plain model, an adapter of the plain one, and all of `ODD`."""
    folder = tmp_path_factory.mktemp("sources")
    model = tiny()
    models.save(model.net, model.tokenizer, folder / "plain")
    compressed(tiny(), folder / "codes")
    adapters.attach(model, adapters.Lora(r=2, alpha=4), seed=1)
    adapters.save(model, folder / "adapter")
    for number, make in enumerate(ODD.values()):
        model, quantised = make()
        at = folder / f"odd{number}"
        if quantised:
            write(model, at, quantised)
        else:
            models.save(model.net, model.tokenizer, at)
    odd = {name: folder / f"odd{number}" for number, name in enumerate(ODD)}
    return {**odd, **{name: folder / name for name in ("codes", "plain", "adapter")}}


def source_of(to: str, sources: dict[str, Path]) -> Path:
    """A model that the target holds: codes where it takes them."""
    checker = targets.find(to)
    for name in ("codes", "a codebook", "positive scales", *(n for n in ODD if n.startswith("super"))):
        with suppress(UsageError):
            checker.load().check(open_checkpoint(sources[name]), checker.kind)
            return sources[name]
    return sources["plain"]


def exported(to: str, out: Path, sources: dict[str, Path], made: dict[str, str] | None = None) -> Report:
    if targets.find(to).takes == "adapter":
        return export_adapter(sources["adapter"], sources["plain"], to, out, made=made or {})
    return export(source_of(to, sources), to, out, made=made or {})


@pytest.fixture(scope="module")
def written(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    root = tmp_path_factory.mktemp("written")
    return cache(lambda to: exported(to, place(to, root / to), sources, made=MADE))


def place(to: str, folder: Path) -> Path:
    return targets.find(to).place(folder, "model")


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {file.name: file.read_bytes() for file in files}


@each_format
def test_1_a_format_states_what_it_is_and_has_its_functions(to):
    target = targets.find(to)
    assert target.help
    assert "\n" not in target.help
    assert target.takes in ("model", "codes", "adapter")
    assert target.suffix == "" or target.suffix.startswith(".")
    module = target.load()
    assert callable(module.check)
    assert callable(module.write)
    assert target.format.summary.endswith(".")


@every
def test_2_what_is_written_is_read_back_and_what_is_rounded_is_said(to, written):
    report = written(to)
    out = report.path
    assert (report.to, out) == (to, place(to, out.parent))
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert report.bytes == sum(map(len, contents(out).values()))
    assert 0 <= report.exact <= report.tensors
    assert report.exact == report.tensors or any("rounded" in note for note in report.notes)
    assert sum(report.types.values()) >= report.tensors


@each_format
def test_3_a_place_that_is_taken_is_left_alone(to, tmp_path, sources):
    out = place(to, tmp_path)
    for make in (out.mkdir, lambda: out.write_text("mine")):
        make()
        with pytest.raises(UsageError, match="exists already"):
            exported(to, out, sources)
        assert out.is_dir() or out.read_text() == "mine"
        out.rmdir() if out.is_dir() else out.unlink()
    wrong = tmp_path / ("folder" if targets.find(to).suffix else "x.gguf")
    with pytest.raises(UsageError, match="is written as a"):
        exported(to, wrong, sources)
    assert not wrong.exists()


@each_format
def test_4_a_full_disk_leaves_nothing(to, tmp_path, sources):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 1000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.raises(StorageError, match="cannot write"):
                exported(to, place(to, tmp_path / "new"), sources)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list((tmp_path / "new").iterdir()) == []


@each_format
def test_5_a_crash_leaves_nothing(to, tmp_path, sources, monkeypatch):
    module = targets.find(to).load()
    whole = module.write

    def crashing(*args: Any) -> Report:
        whole(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write", crashing)
    with pytest.raises(KeyboardInterrupt):
        exported(to, place(to, tmp_path / "new"), sources)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("to", OF_MODELS)
def test_6_what_it_cannot_hold_is_refused_before_anything_is_written_with_targets_that_can(
    to, tmp_path, sources, monkeypatch
):
    target = targets.find(to)
    module = target.load()
    begun: list[bool] = []

    def watched(model: Any, out: Path, *args: Any) -> Report:
        try:
            return whole(model, out, *args)
        except UsageError:
            begun.append(out.is_file() or (out.is_dir() and any(out.iterdir())))
            raise

    whole = module.write
    monkeypatch.setattr(module, "write", watched)
    for number, name in enumerate(ODD):
        folder = tmp_path / f"odd{number}"
        try:
            export(sources[name], to, place(to, folder))
        except UsageError as refused:
            error = refused
        else:
            continue
        assert not place(to, folder).exists()
        if target.states("BLOCK_WIDTHS") or "widths" not in name:
            with pytest.raises(UsageError) as early:
                module.check(open_checkpoint(sources[name]), target.kind)
            assert early.value.message == error.message
        named = re.findall(r"(?:--to|or) ([a-z][a-z0-9_-]*(?::[a-z0-9_]+)?)", str(error.hint))
        instead = [other for other in named if other in targets.every()]
        assert instead, error.hint
        for other in set(instead) - TAKEN.setdefault(name, set()):
            export(sources[name], other, place(other, folder / "instead"))
            TAKEN[name].add(other)
    assert not any(begun)


@every
def test_7_a_file_says_where_the_model_comes_from(to, sources, written):
    whole = b"".join(contents(written(to).path).values())
    stated = bool(targets.find(to).states("PROVENANCE"))
    if targets.find(to).takes != "adapter" and (source := source_of(to, sources)) != sources["plain"]:
        assert (artefact.Master(source).digest().encode() in whole) == stated
    else:
        assert (MADE["fleetune.method"].encode() in whole) == stated


@every
def test_8_the_same_work_gives_the_same_bytes(to, tmp_path, sources, written):
    again = exported(to, place(to, tmp_path / "again"), sources, made=MADE)
    assert contents(again.path) == contents(written(to).path)


@each_format
def test_9_a_model_is_no_adapter(to, tmp_path, sources):
    if targets.find(to).takes == "adapter":
        with pytest.raises(UsageError, match="only a run has an adapter"):
            export(sources["plain"], to, place(to, tmp_path))


def test_a_registered_target_is_in_the_help_and_in_hints(capsys):
    assert list(targets.every())[-1] == "npz"
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert re.search(r"\bnpz\b", capsys.readouterr().out)
    with pytest.raises(UsageError, match="Did you mean 'npz'") as caught:
        targets.find("npzz")
    assert str(caught.value.hint).endswith(", npz")
