"""A method that a caller wrote is taken as an object: tuned in this process, and its result used in any."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import command_line
import fleetune
from fleetune.common.settings import setting
from fleetune.errors import Interrupted, UsageError
from fleetune.seeds import VARIABLE
from fleetune.tuning import methods
from fleetune.tuning.methods import fedit, mezo
from heard import Heard

pytestmark = pytest.mark.usefixtures("place")
FEW: dict[str, Any] = command_line.FEW | {"limit": 24, "max_length": 64}


@dataclass(frozen=True)
class MiddleLora(fedit.Method):
    """Take the coordinate-wise median."""

    r: int = setting(2, "r", "rank")
    shrink: float = 1.0  # a field without `setting`

    def aggregate(self, state: Any, replies: Any, rule: Any = None) -> Any:
        if not (taken := [reply.payload.arrays for reply in replies]):
            return state
        median = {n: self.shrink * np.median([t[n] for t in taken], axis=0) for n in state.tensors}
        return state._replace(tensors={n: m.astype(np.float32) for n, m in median.items()})


@dataclass(frozen=True)
class Method(mezo.Method):
    KIND: ClassVar[str] = "ledger"
    CLIENTS: ClassVar[int] = 3


@pytest.fixture(autouse=True)
def none_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods.REGISTRY, "_given", {})


def test_it_is_tuned_with_its_own_functions_and_settings():
    run = fleetune.tune("tiny", "demo", method=MiddleLora(lr=1e-2, shrink=0.0), **FEW)
    recipe = fleetune.open(run).recipe
    assert (recipe.method, recipe.set["shrink"], recipe.set["r"]) == ("middle-lora", 0.0, 2)
    assert run.folder.name == "0001-middle-lora-tiny"
    assert run.done.tuned["loss"] == run.done.base["loss"]  # an adapter of zeros
    moved = fleetune.tune("tiny", "demo", method=MiddleLora(lr=1e-2), settings={"shrink": 0.5}, **FEW)
    assert moved.done.tuned["loss"] != run.done.base["loss"]


def test_a_run_of_it_goes_on_in_this_process():
    once = Heard(lambda heard: len(heard.of("eval")) == 2)
    options = FEW | {"method": MiddleLora(lr=1e-2), "rounds": 2}
    whole = fleetune.tune("tiny", "demo", **options)
    with pytest.raises(Interrupted):
        fleetune.tune("tiny", "demo", listener=once, **options)
    assert fleetune.resume_run("latest").digest == whole.digest


def test_another_process_uses_the_result_and_is_told_what_it_cannot_do():
    run = fleetune.tune("tiny", "demo", method=MiddleLora(lr=1e-2), **FEW)
    here = fleetune.evaluate(run)["loss"]
    script = (
        "import fleetune; from fleetune.cli.main import main\n"
        f"print(fleetune.evaluate({str(run.folder)!r})['loss'], main(['export', '1', '--to', 'hf', '-q']), "
        "main(['tune', '--resume', '1']))"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loss, exported, resumed = there.stdout.split()[-3:]
    assert float(loss) == pytest.approx(here, abs=1e-6)
    assert (exported, resumed) == ("0", "2"), there.stderr
    assert "made by the method 'middle-lora', which is not known here" in there.stderr


def test_a_class_called_method_has_the_name_of_its_module(monkeypatch):
    monkeypatch.setenv(VARIABLE, "torch")  # which compiles nothing
    method = Method(K=8, tau=2, lr=1e-4, batch_size=2)
    run = fleetune.tune("tiny", "demo", method=method, **FEW | {"clients": 0})
    assert run.folder.name == "0001-test-objects-tiny"
    assert run.done.result.endswith("ledger.safetensors")
    assert fleetune.open(run).recipe.clients == 3
    assert "test-objects" in fleetune.methods()


@dataclass(frozen=True)
class Half(methods.Method):
    lr: float = 1.0

    def init(self, model: Any, key: int) -> None: ...


@dataclass(frozen=True)
class Unstated(methods.Method):
    def nothing(self, *_: Any) -> None: ...

    init = broadcast = expects = local = aggregate = apply = nothing


@dataclass(frozen=True)
class Fedit(fedit.Method):
    pass


@dataclass
class Thawed:
    lr: float = 1.0


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (Thawed(), "Thawed of .* is no method"),
        (Unstated(), "does not state KIND = 'ledger' or 'adapter'"),
        (Fedit(), "has the name of the method 'fedit'"),
        (MiddleLora, "the method is a class"),
    ],
)
def test_what_is_no_method_says_what_is_missing(method, why):
    with pytest.raises(UsageError, match=why):
        fleetune.tune("tiny", "demo", method=method, **FEW)
    assert not Path("runs").exists()


def test_a_class_without_all_six_functions_makes_no_object():
    with pytest.raises(TypeError, match=r"Half .*aggregate.*apply.*broadcast.*expects.*local"):
        Half()  # type: ignore[abstract]
