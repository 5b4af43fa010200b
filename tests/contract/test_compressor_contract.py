"""The contract of compressors: every method x every property, those of other packages included."""

import dataclasses
import inspect
import json
import re
import runpy
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fleetune import compression, models
from fleetune.cli import main
from fleetune.common import registry, settings
from fleetune.compression import Solved, Solver
from fleetune.compression.layerwise import hessian
from fleetune.data import Encoded
from fleetune.errors import Interrupted, RecipeError, UsageError
from fleetune.models import Model
from fleetune.models.artefact import Master, dense

STEPS = {"steps": 4, "batch_size": 3, "save_every": 3}
# Settings with which a method runs on the tiny model in a second.  A method that is not named here runs with its defaults.
QUICK: dict[str, dict[str, Any]] = {
    "gkd": {"teacher": "another", "max_new_tokens": 6} | STEPS,
    "llm-pruner": {"first": 0, "last": 0, "round_to": 4, "ratio": 0.4} | STEPS,
}
# Options that change what is computed keep the contract too.
VARIANTS = [
    *("optq:grid=asymmetric,bits=3", "optq:group=0", "rtn:grid=universal"),
    *(f"sparsegpt:{more}" for more in ("n=2", "bits=4", "sparsity=0")),
    *("gkd:lmbda=1", "gkd:lmbda=0,seq_kd=true,beta=0", "llm-pruner:importance=mixed,scope=global"),
]


def values(case: str) -> dict[str, Any]:
    """The settings of a case such as `optq` or `optq:group=0,bits=3`."""
    name, _, changes = case.partition(":")
    return QUICK.get(name, {}) | dict(pair.split("=") for pair in changes.split(",") if pair)


def method(case: str) -> Any:
    return compression.make(case.partition(":")[0], values(case))


def matrix(R: int, C: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(W float32 [R, C], H float32 [C, C] of inputs whose variances fall as those of language models do)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * C, C, generator=g) * torch.arange(1, C + 1) ** -0.7
    H = torch.zeros(C, C)
    hessian.accumulate(H, x)
    return torch.randn(R, C, generator=g), hessian.mirrored(H)


def solved(solver: Solver, W: Tensor, H: Tensor) -> tuple[Tensor, Solved]:
    answer = solver.solve(W.clone(), H.clone())
    return dense(answer.weight), answer


def loss(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) in float64."""
    D = W.double() - Q.double()
    return float(torch.trace(D @ H.double() @ D.T))


def rows(count: int = 12, seed: int = 0) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt, answer = rng.integers(60, 70, rng.integers(2, 8)), rng.integers(60, 70, rng.integers(1, 16))
        made.append(Encoded(np.array([256, *prompt, *answer, 257], np.int32), 1 + len(prompt)))
    return made


def whole() -> Model:
    return models.tiny_llama(0, layers=4)


def bits(model: Model) -> str:
    return models.digest(models.named_tensors(model.net))


def stop_at(last: int, seen: list[int]) -> Callable[..., None]:
    """A callback that notes every step or row, and raises Interrupted in `last`."""

    def on(done: int, total: int, *_: object) -> None:
        seen.append(done)
        if done == last:
            raise Interrupted("stopped")

    return on


def distilled(case: str, folder: Path, on_step: Callable[..., None]) -> tuple[Model, Model]:
    """(student, teacher) after the training of a case."""
    chosen, teacher = method(case), models.tiny_llama(1, layers=4)
    student = chosen.student(whole())
    chosen.train(student, teacher, rows(), 7, folder, on_step)
    return student, teacher


def pruned(case: str, folder: Path, on_row: Callable[..., None], on_step: Callable[..., None]) -> Model:
    chosen, model = method(case), whole()
    small = chosen.prune(model, rows(), on_row)
    return chosen.train(small, rows(), 7, folder, on_step)


ROOT = Path(__file__).parent.parent.parent
Check = Callable[[str, Path], None]


def ignore(*_: object) -> None:
    pass


def the_paper_is_cited(case: str, tmp: Path) -> None:
    entry, cls = compression.entries()[case], compression.method_class(case)
    text = inspect.getdoc(inspect.getmodule(cls)) or ""
    assert re.search(r"arXiv \d{4}\.\d{4,5}", entry.text("PAPER")), "PAPER has no arXiv number"
    assert re.search(r"arXiv \d{4}\.\d{4,5}", text), "cite the paper with its arXiv number"
    assert re.search(r"[Aa]lgorithm|[Ee]quation|[Ss]ection", text), "say where in the paper"
    assert entry.summary == text.split("\n")[0] != ""


def settings_are_explained(case: str, tmp: Path) -> None:
    cls = compression.method_class(case)
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    for field in dataclasses.fields(cls):
        assert field.metadata.get("symbol"), f"{field.name} has no symbol"
        assert field.metadata.get("help"), f"{field.name} has no help"


def nonsense_is_refused_at_once(case: str, tmp: Path) -> None:
    """All settings that are refused alone are named together, whatever is wrong with them."""
    cls = compression.method_class(case)
    numbers = [s.name for s in settings.of(cls) if s.type in (int, float)]
    texts = {"no_such_setting": 1} | dict.fromkeys(numbers, "much")
    with pytest.raises(RecipeError) as error:
        compression.make(case, values(case) | texts)
    assert len(error.value.problems) == len(texts)
    below: dict[str, object] = {}
    for name in numbers:
        try:
            compression.make(case, values(case) | {name: -1})
        except RecipeError:
            below[name] = -1
    if below:
        with pytest.raises(RecipeError) as error:
            compression.make(case, values(case) | below)
        assert all(name in str(error.value) for name in below)


def it_has_a_page(case: str, tmp: Path) -> None:
    page = runpy.run_path(str(ROOT / "docs" / "build.py"))["compress_page"](case)
    assert f"# {case}\n" in page
    assert compression.entries()[case].summary in page
    assert all(f"| `{s.name}` |" in page for s in settings.of(compression.method_class(case)))


def a_solver_is_deterministic_and_changes_nothing(case: str, tmp: Path) -> None:
    """Layers with one input share a Hessian, and a layer's weights are its own."""
    W, H = matrix(6, 64)
    H[:, 5] = H[5] = 0
    before = W.clone(), H.clone()
    first = dense(method(case).solve(W, H).weight)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])
    torch.rand(1)
    assert torch.equal(dense(method(case).solve(W, H).weight), first)


def what_is_compressed_already_costs_nothing(case: str, tmp: Path) -> None:
    W, H = matrix(6, 64)
    zero, answer = solved(method(case), torch.zeros(6, 64), H)
    assert not zero.any()
    assert not answer.loss
    for _ in range(10):
        Q, answer = solved(method(case), W, H)
        if torch.equal(Q, W):
            break
        W = Q
    assert torch.equal(Q, W), "it does not come to rest on its own results"
    assert not answer.loss


def the_stated_loss_is_that_of_the_matrix(case: str, tmp: Path) -> None:
    for C in (64, 320):
        W, H = matrix(6, C)
        Q, answer = solved(method(case), W, H)
        if answer.loss is not None:
            assert answer.loss == pytest.approx(loss(W, Q, H), rel=1e-4, abs=1e-6)


def a_matrix_that_passes_the_check_is_solved(case: str, tmp: Path) -> None:
    """And with default settings no other."""
    chosen = method(case)
    for R, C in ((1, 1), (4, 31), (4, 32), (1, 64), (3, 100), (4, 128), (4, 130), (2, 160)):
        problem = chosen.check("layer.weight", R, C)
        W, H = matrix(R, C)
        try:
            found = [solved(chosen, W, h)[0] for h in (H, torch.zeros(C, C))]
            works = all(Q.shape == W.shape and bool(torch.isfinite(Q).all()) for Q in found)
        except RuntimeError:
            works = False
        assert works or problem
        assert not problem or "layer.weight" in problem
        assert ":" in case or works == (problem == "")


def resumes(trained: Callable[[Path, Callable[..., None]], Model], tmp: Path) -> str:
    """The bits of a model after its training, which it also has after one that was stopped in its second step."""
    steps: list[int] = []
    want = bits(trained(tmp / "whole", stop_at(0, steps)))
    assert steps == list(range(1, len(steps) + 1))
    first, second = list[int](), list[int]()
    with pytest.raises(Interrupted):
        trained(tmp / "stopped", stop_at(2, first))
    assert bits(trained(tmp / "stopped", stop_at(0, second))) == want
    assert [*first, *second] == steps
    return want


def a_trainer_calls_back_after_each_step_and_leaves_its_teacher(case: str, tmp: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    student, teacher = distilled(case, tmp / "a", lambda step, n, loss: seen.append((step, n, loss)))
    assert [step for step, _, _ in seen] == list(range(1, len(seen) + 1))
    assert {n for _, n, _ in seen} == {len(seen)}
    assert bits(teacher) == bits(models.tiny_llama(1, layers=4))
    before = bits(student)
    assert method(case).distance(student, teacher, rows()) >= 0
    assert bits(student) == before != bits(whole())


def a_trainer_resumes_bit_for_bit(case: str, tmp: Path) -> None:
    """A step in which it is interrupted is saved; so is the last."""
    want = resumes(lambda folder, on_step: distilled(case, folder, on_step)[0], tmp)
    assert bits(distilled(case, tmp / "again", ignore)[0]) == want
    assert bits(distilled(case, tmp / "whole", lambda *_: pytest.fail("all steps are done"))[0]) == want


def a_trainer_states_what_it_takes(case: str, tmp: Path) -> None:
    chosen, teacher = method(case), models.tiny_llama(1, layers=4)
    chosen.check(whole(), teacher, 32)
    assert chosen.memory(whole(), teacher, 32) > 0
    assert chosen.disk(whole()) > 0
    with pytest.raises(RecipeError):
        chosen.check(whole(), teacher, 10**6)


def a_pruner_makes_a_smaller_model_the_same_each_time(case: str, tmp: Path) -> None:
    chosen = method(case)
    chosen.check(whole())
    assert chosen.disk(whole()) > 0
    small = pruned(case, tmp / "a", ignore, ignore)
    assert small.n_params < whole().n_params
    assert bits(pruned(case, tmp / "b", ignore, ignore)) == bits(small)


def a_pruner_resumes_its_recovery_bit_for_bit(case: str, tmp: Path) -> None:
    if method(case).recover != "none":
        resumes(lambda folder, on_step: pruned(case, folder, ignore, on_step), tmp)


EVERY: list[Check] = [the_paper_is_cited, settings_are_explained, nonsense_is_refused_at_once, it_has_a_page]
OF_KIND: dict[compression.Kind, list[Check]] = {
    "solver": [
        a_solver_is_deterministic_and_changes_nothing,
        what_is_compressed_already_costs_nothing,
        the_stated_loss_is_that_of_the_matrix,
        a_matrix_that_passes_the_check_is_solved,
    ],
    "trainer": [
        a_trainer_calls_back_after_each_step_and_leaves_its_teacher,
        a_trainer_resumes_bit_for_bit,
        a_trainer_states_what_it_takes,
    ],
    "pruner": [a_pruner_makes_a_smaller_model_the_same_each_time, a_pruner_resumes_its_recovery_bit_for_bit],
}


def checks_of(case: str) -> list[Check]:
    name, _, variant = case.partition(":")
    return [*([] if variant else EVERY), *OF_KIND[compression.kind_of(name)]]


CASES = [(case, check) for case in [*compression.entries(), *VARIANTS] for check in checks_of(case)]


@pytest.mark.parametrize(("case", "check"), CASES, ids=[f"{case}-{check.__name__}" for case, check in CASES])
def test_contract(case, check, tmp_path):
    check(case, tmp_path)


XNOR = '''
"""Replace each weight by its sign times the mean magnitude of its row.

Rastegari et al., "XNOR-Net", ECCV 2016, arXiv 1603.05279 (section 3.1, equation 6).
"""

from dataclasses import dataclass
from typing import ClassVar

from fleetune.common.settings import setting
from fleetune.compression import Solved

PAPER = "Rastegari et al., ECCV 2016, arXiv 1603.05279"


@dataclass(frozen=True)
class Solver:
    data: ClassVar[bool] = False
    scale: float = setting(1.0, "α", "factor of the mean magnitude")

    def __post_init__(self):
        if self.scale <= 0:
            raise ValueError(f"scale = {self.scale} must be positive")

    def check(self, name, R, C):
        return ""

    def solve(self, W, H):
        return Solved(W.sign() * (self.scale * W.abs().amax(1, keepdim=True)))
'''


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A compressor that another package registers, its name spelt with an underscore."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    register(monkeypatch, tmp_path, "row_sign", XNOR)
    return "row-sign"


def register(patch: pytest.MonkeyPatch, folder: Path, name: str, code: str) -> None:
    module = f"compressor_{name}"
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    point = EntryPoint(name, module, compression.REGISTRY.group)
    patch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    patch.delitem(sys.modules, module, raising=False)


def test_a_compressor_of_another_package_keeps_the_contract(other, tmp_path):
    assert compression.kind_of(other) == "solver"
    for check in checks_of(other):
        check(other, tmp_path / check.__name__)


def test_a_compressor_of_another_package_is_listed_and_compresses(other, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # the help breaks lines at hyphens
    assert other in main.command_parsers()["compress"].format_help()
    for spelling in ("row-sign", "row_sign"):
        assert main.main(["compress", "--list", spelling]) == 0
        out = capsys.readouterr().out
        assert "Rastegari" in out
        assert "factor of the mean magnitude" in out
    assert main.main(["compress", "--list"]) == 0
    assert other in capsys.readouterr().out
    models.tiny_llama().save(tmp_path / "tiny")
    args = ["compress", "./tiny", "--method", other, "--set", "scale=0.5", "--json"]
    assert main.main(args) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    master = Master(Path(done["folder"]) / "model")
    assert (master.head.method, master.head.settings) == (other, {"scale": 0.5})
    assert master.digest() == done["digest"]
    assert all(len(row.unique()) <= 3 for row in master.weight("model.layers.0.mlp.down_proj.weight"))
    assert main.main([*args[:-2], "scale=0", "--json"]) == 2
    assert "scale = 0.0 must be positive" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (XNOR.replace("PAPER =", "paper ="), "does not state PAPER"),
        (XNOR.replace("class Solver", "class Compressor"), "defines 0 compressors instead of one"),
        (XNOR + "\n\nclass Pruner:\n    pass\n", "defines 2 compressors instead of one"),
        (XNOR.replace("def check", "def checked"), "does not define check"),
    ],
)
def test_a_compressor_that_is_none_is_a_clear_error(code, text, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    register(monkeypatch, tmp_path, f"broken_{abs(hash(text))}", code)
    (name,) = [p.name for p in registry.entry_points(group=compression.REGISTRY.group)]
    with pytest.raises(UsageError, match=text):
        compression.make(name, {})
