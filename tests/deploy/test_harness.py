"""Kept gain, bits, speed by a clock of ours, and the process that measures, against numbers worked out by hand."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from deploy_harness import compressed, tiny

from fleetune import models
from fleetune.common.memory import peak_rss
from fleetune.deploy import export, harness
from fleetune.deploy.harness import MeasureJob, kept_gain
from fleetune.deploy.torch_engine import of_artefact
from fleetune.errors import DataError, FleetuneError, UsageError


def test_kept_gain() -> None:
    found = kept_gain(base=3.0, tuned=2.0, small_base=3.25, small_tuned=2.5)
    assert (found.gain, found.value) == (1.0, 0.75)
    assert found.text == "validation loss: 75 % of what tuning gained is kept"


def test_no_gain_is_nothing_to_keep_and_said_so() -> None:
    same = kept_gain(2.5, 2.5, 2.75, 2.5)
    assert (same.value, same.gain) == (None, 0.0)
    assert "no gain to keep" in same.text
    worse = kept_gain(3.0, 4.0, 3.0, 2.0)
    assert (worse.value, worse.gain) == (None, -1.0)
    assert "made it worse" in worse.text
    unknown = kept_gain(3.0, 2.0, math.inf, 2.5)
    assert unknown.value is None
    assert "not finite" in unknown.text


def test_bits_of_artefacts_and_files_are_exact(tmp_path: Path) -> None:
    model = tiny()
    compressed(model, tmp_path / "four", bits=4, group=32)
    compressed(tiny(), tmp_path / "three", bits=3, group=64, zero=4)
    four, three = harness.bits(tmp_path / "four"), harness.bits(tmp_path / "three")
    assert four.linear == 4 + (16 + 8) / 32  # an fp16 scale and a byte's zero for 32 codes
    assert three.linear == 3 + (16 + 8) / 64
    n = {name: p.numel() for name, p in model.net.named_parameters()}
    linear = sum(count for name, count in n.items() if "proj" in name)
    assert four.all == (4.75 * linear + 32 * (sum(n.values()) - linear)) / sum(n.values())
    export.write(tmp_path / "four", "gguf", tmp_path / "a.gguf")
    export.write(tmp_path / "four", "hf:bf16", tmp_path / "bf16")
    file = harness.bits(tmp_path / "a.gguf")
    assert file.linear == 4.5
    norms = sum(count for name, count in n.items() if "norm" in name)
    embedding = sum(n.values()) - linear - norms
    assert file.all == (4.5 * linear + 8.5 * embedding + 32 * norms) / sum(n.values())
    assert harness.bits(tmp_path / "bf16") == (16.0, 16.0)


class Paced:
    """A model whose passes take the seconds it is told, by its own clock."""

    vocab = 5

    def __init__(self, passes: Sequence[tuple[float, float]]) -> None:
        self.passes, self.now, self.read, self.room = list(passes), 0.0, list[list[int]](), 0
        self.each = 0.0

    def clock(self) -> float:
        return self.now

    def open(self, length: int) -> None:
        self.room = length

    def prefill(self, ids: Sequence[int]) -> None:
        self.read.append(list(ids))
        seconds, self.each = self.passes.pop(0)
        self.now += seconds

    def step(self) -> None:
        self.now += self.each

    def losses(self, rows: Sequence[harness.Row]) -> list[tuple[float, int]]:
        raise AssertionError("not asked for")

    def scored_logits(self, rows: Sequence[harness.Row]) -> Iterator[np.ndarray]:
        raise AssertionError("not asked for")

    def close(self) -> None:
        pass


def test_speed_is_the_median_of_the_passes_after_the_first() -> None:
    engine = Paced([(100.0, 100.0), (2.0, 0.5), (8.0, 0.25), (4.0, 4.0)])
    assert harness.speed(engine, 8, 3, 3, engine.clock) == (2.0, 2.0)  # 8 tokens in 4 s, one in 0.5 s
    assert engine.read == [[0, 1, 2, 3, 4, 0, 1, 2]] * 4
    assert engine.room == 11


def by_row(*changes: float) -> list[tuple[float, int]]:
    """The losses of four rows of 2 tokens."""
    return [(2 * (3.0 + c), 2) for c in changes]


def test_a_kept_gain_has_the_error_of_a_ratio_over_rows() -> None:
    b, t = by_row(0, 0, 0, 0), by_row(-1.0, -1.2, -0.8, -1.0)
    cb, ct = by_row(0.5, 0.5, 0.5, 0.5), by_row(-0.4, -0.6, -0.3, -0.1)
    found = kept_gain(3.0, 2.0, 3.5, 2.65, (b, t, cb, ct))
    gains, small = np.array([1.0, 1.2, 0.8, 1.0]), np.array([0.9, 1.1, 0.8, 0.6])
    assert found.value == pytest.approx(0.85)
    assert found.gain_error == pytest.approx(gains.std(ddof=1) / 2)
    residuals = small - small.sum() / gains.sum() * gains
    assert found.error == pytest.approx(math.sqrt(4 / 3 * (residuals**2).sum()) / gains.sum())
    assert found.text == "validation loss: 85 ± 8 % of what tuning gained is kept"


def test_no_gain_is_kept_where_the_gain_is_within_noise() -> None:
    b, t = by_row(0, 0, 0, 0), by_row(-1.0, 1.1, -0.8, 0.6)
    found = kept_gain(3.0, 2.975, 3.0, 2.9, (b, t, b, t))
    assert found.value is None
    assert found.text.startswith("validation loss: not measurable on 4 rows: the tuning gain (0.0250 ± ")
    assert found.text.endswith("is within noise")
    alone = kept_gain(3.0, 2.0, 3.0, 2.5, (b[:1], t[:1], b[:1], t[:1]))
    assert alone.value is None
    assert "not measurable on 1 row:" in alone.text


def test_windows_are_apart_and_the_last_may_be_short() -> None:
    # one token predicts nothing
    assert harness.windows([[1, 2, 3], [4, 5]], 2, 9) == [([1, 2], 1), ([3, 4], 1)]
    assert harness.windows([[1, 2, 3, 4, 5]], 3, 9) == [([1, 2, 3], 1), ([4, 5], 1)]
    assert harness.windows([[1, 2, 3, 4, 5]], 2, 1) == [([1, 2], 1)]
    with pytest.raises(DataError, match="nothing to predict"):
        harness.windows([[1]], 8, 2)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "model"
    compressed(tiny(), folder)
    return folder


def reference(folder: Path, rows: Sequence[harness.Row]) -> float:
    """Mean cross-entropy by logits of whole rows, in float64."""
    net = models.load_artefact(folder).net
    total, count = 0.0, 0
    for ids, n_prompt in rows:
        logits = net(input_ids=torch.tensor([ids])).logits[0].double().detach().numpy()
        for t in range(max(n_prompt, 1), len(ids)):
            total += np.log(np.exp(logits[t - 1]).sum()) - logits[t - 1, ids[t]]
            count += 1
    return float(total / count)


@pytest.mark.slow
def test_a_process_measures_what_the_model_gives_and_its_own_memory(artefact: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 260, n).tolist(), k) for n, k in ((9, 4), (17, 0), (6, 5))]
    windows = [(rng.integers(0, 260, 24).tolist(), 1) for _ in range(3)]
    ours = np.ones(100_000_000)  # 800 MB here are none of the child's
    asked = {"prompt": 8, "generate": 2, "repeats": 1, "rows": rows, "windows": windows}
    found = harness.measured(MeasureJob("artefact", str(artefact), 1, **asked))
    assert 100e6 < found.peak_rss < peak_rss() - 400e6
    assert found.values["loss"] == pytest.approx(reference(artefact, rows), rel=1e-5)
    assert found.values["perplexity"] == pytest.approx(math.exp(reference(artefact, windows)), rel=1e-5)
    assert found.prefill is not None
    assert found.prefill > 0
    assert ours[-1] == 1


def test_steps_write_the_greedy_continuation(artefact: Path) -> None:
    engine = of_artefact(str(artefact), "fp32", True)
    engine.prefill([1, 2, 3])
    seen = [1, 2, 3]
    for _ in range(4):
        with torch.inference_mode():
            whole = engine.model.net(input_ids=torch.tensor([seen])).logits[0, -1]
        assert torch.allclose(engine.logits, whole, atol=1e-5)
        seen.append(int(whole.argmax()))
        engine.step()


def test_a_module_in_the_working_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('run')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):  # of the file alone, as below
        harness.measured(MeasureJob("gguf", "no.gguf", 1))


def test_what_goes_wrong_in_the_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError) as told:  # not installed, or no such file: either is an error of use
        harness.measured(MeasureJob("gguf", "no.gguf", 1))
    assert told.value.hint
    script = tmp_path / "dies"
    script.write_text("#!/bin/sh\necho of thirst >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(harness.sys, "executable", str(script))
    with pytest.raises(FleetuneError, match=r"measuring a\.gguf ended with 3: of thirst") as ended:
        harness.measured(MeasureJob("gguf", "a.gguf", 1))
    assert "signal" not in (ended.value.hint or "")
    for number, hint in ((9, "memory"), (11, "a negative number is a signal")):
        script.write_text(f"#!/bin/sh\nkill -{number} $$\n")
        with pytest.raises(FleetuneError, match=rf"ended with -{number}") as ended:
            harness.measured(MeasureJob("gguf", "a.gguf", 1))
        assert hint in (ended.value.hint or "")
