"""`fleetune demo` from its first line to its last, with a tiny model in the place of the one that it fetches."""

from pathlib import Path

import pytest
from deploy_harness import tiny

from command_line import ok
from fleetune import models
from fleetune.cli.commands import demo
from fleetune.evaluation import answers, measures
from fleetune.tuning.result.finished import held_out


def test_the_demo_tunes_twice_and_ends_with_a_file_and_its_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny().save(tmp_path / "little")
    monkeypatch.setattr(demo, "MODEL", "./little")
    monkeypatch.setattr(models, "pull", lambda name, **_: tmp_path / name)  # the network's part
    told = ok(capsys, "demo", "--quick")
    done = [event for event in told if event["event"] == "done"]
    names = ["0001-fedit-little", "0002-fedkseed-little", "0003-qronos-fedit-little"]
    assert [Path(e.get("run") or e["folder"]).name for e in done] == names
    (export,) = [event for event in told if event["event"] == "export"]
    assert export["exact"] == export["tensors"]
    (said,) = [event for event in told if event["event"] == "answer"]
    rows = held_out(tmp_path / "runs" / "0001-fedit-little", offline=True)
    assert said["prompt"] == rows[0].messages[-1][1]
    packed = models.load(export["path"], device="cpu", base="mapped")
    assert [said["text"]] == answers.generate(packed, rows[:1], max_new_tokens=demo.ANSWER)
    after = measures.evaluate(packed, rows[1::2], ["loss"], max_length=demo.LENGTH).values
    assert after["loss"] == pytest.approx(done[2]["after"]["loss"], rel=1e-5)
