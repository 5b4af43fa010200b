"""How a fleet's run stands: from the folder of one that is served, finished, killed or damaged; and how one is stopped."""

import json
import runpy
from pathlib import Path

import fleet_run
import jsonschema
import pytest
from fleet_run import EVIL, client

from command_line import refused
from fleetune.cli.main import main
from fleetune.common import files
from fleetune.errors import StorageError, UsageError
from fleetune.fleet import status
from fleetune.fleet.table import LATE, Devices
from fleetune.runs import compression_folder
from fleetune.runs.rundir import RunDir

HOUR = 3600.0  # seconds: a busy machine takes some


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fleet_run.write(tmp_path / "0001-fedkseed-tiny")


def test_a_run_that_is_served(run):
    with RunDir(run):
        now = status.look(run)
    assert (now.status, now.served, now.round, now.rounds) == ("running", True, 3, 8)
    assert now.heard < 10
    assert now.states == {"at work": 1, "ready": 1, "away": 1}
    # client 1 was ok and then refused: its last line counts
    assert now.replies == {"ok": 4, "refused": 1, "late": 0, "dropped": 1, "failed": 0, "declined": 0}
    assert (now.bytes_up, now.bytes_down, now.round_seconds, now.loss) == (660, 528, 2.5, 3.6)
    assert [(d.name, d.does, d.round, d.status, d.lost) for d in now.devices] == [
        ("bakery", "at work", 2, "ok", 0),
        ("dialysis-ward", "ready", 2, "refused", 1),
        (EVIL, "away", 2, "dropped", 1),
    ]


def test_why_a_device_was_refused_is_shown(run, capsys):
    why = "refused: it has not the run's model in this revision; its console says more"
    fleet_run.word(run, devices=[{"name": "bakery", "client": 0, "does": why}], waits="for 1 more")
    with RunDir(run):
        assert status.look(run).states == {"refused": 1}
        assert main(["fleet", "status", "latest", "--out", str(run.parent)]) == 0
    said = capsys.readouterr().out
    assert "1 refused" in said
    assert "waits     for 1 more" in said
    assert "it has not the run's model" in " ".join(said.split())


def test_replies_of_a_round_in_progress_are_shown_and_not_yet_counted(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(client(3, 0, "late", "no answer in 5 s")) + "\n")
    now = status.look(run)
    assert now.replies["late"] == 0
    assert (now.devices[0].round, now.devices[0].status, now.devices[0].lost) == (3, "late", 0)


def test_a_killed_server_and_a_finished_run(run):
    fleet_run.word(run, said=40 * HOUR)
    now = status.look(run)
    assert (now.served, now.status) == (False, "interrupted")
    assert 40 * HOUR <= now.heard < 41 * HOUR
    assert now.states == {}
    assert {d.does for d in now.devices} == {""}  # what they did is no longer so
    (run / "status").write_text("done\n")
    assert status.look(run).status == "done"


@pytest.mark.parametrize("change", [{"devices": [7]}, {"t": "now"}, {"devices": [{"client": 0}]}])
def test_files_of_another_form_are_refused(run, change):
    fleet_run.word(run, **change)
    with pytest.raises(StorageError, match="another form"):
        status.look(run)


def test_a_run_of_the_simulator_has_no_fleet(run):
    (run / "fleet.json").unlink()
    with pytest.raises(UsageError, match="not the run of a real fleet"):
        status.look(run)


def test_the_command_says_the_same_with_and_without_json(run, capsys):
    fleet_run.word(run, said=40 * HOUR)
    out = ["--out", str(run.parent)]
    assert main(["fleet", "status", "latest", "--json", *out]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    build = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "build.py"))
    schema = json.loads(build["events_schema"]())
    jsonschema.validate(found, {**schema, "anyOf": [{"$ref": "#/$defs/FleetShown"}]})
    assert (found["event"], found["served"], found["replies"]["ok"]) == ("fleet", False, 4)
    assert main(["fleet", "status", "1", *out]) == 0
    said = capsys.readouterr()
    assert "no server runs it; last heard 1d16h ago" in said.err
    told = ["interrupted", "round     3 of 8", "4 ok · 1 refused · 1 dropped", "dialysis-ward"]
    for text in (*told, "it goes 9 times", f"fleetune fleet serve --resume {run}"):
        assert text in said.out


def test_the_command_that_goes_on_has_the_flags_by_which_devices_find_the_server(tmp_path):
    (tmp_path / "compress.json").write_text("{}")
    file = tmp_path / status.FILE
    known = dict.fromkeys(status.FIELDS, 0) | {"devices": [], "t": 1.0, "address": "", "machine": ""}
    file.write_text(files.json_text({**known, "flags": " --host 0.0.0.0 --keys keys"}))
    assert status.resume(tmp_path) == f"fleetune compress --resume {tmp_path} --host 0.0.0.0 --keys keys"
    assert status.look(tmp_path).status == "interrupted"
    assert [name for name, _ in status.facts(status.look(tmp_path))] == ["block", "server"]
    (tmp_path / "compress.json").unlink()
    file.write_text(files.json_text(known))  # of an earlier version
    assert status.resume(tmp_path) == f"fleetune fleet serve --resume {tmp_path}"


def test_the_log_of_a_run_is_shown(run, capsys):
    assert "there is no" in refused(capsys, "fleet", "logs", "latest", "--out", str(run.parent))
    (run / "log.txt").write_text("2026-12-01 10:00:00 press-3 is here\n")
    assert main(["fleet", "logs", "latest", "--out", str(run.parent)]) == 0
    assert capsys.readouterr().out == (run / "log.txt").read_text()


def test_stop_reaches_the_session_that_wrote_the_last_word_and_no_other(run):
    with pytest.raises(UsageError, match="no server has"):
        status.ask_to_stop(run)
    with RunDir(run):
        status.ask_to_stop(run)
        assert not status.take_stop(run, "another")
        assert status.take_stop(run, "5e55")
        assert not status.take_stop(run, "5e55")  # once


def test_a_stopped_run_is_served_again_at_the_door_that_it_had(run, capsys):
    (run / "status").write_text("interrupted\n")
    fleet_run.word(run, flags=" --port 9 --keys none --certificate certs --wait 2")
    said = refused(capsys, "fleet", "serve", "--resume", "latest", "--port", "10", "--out", str(run.parent))
    assert "taken from the run: --keys none --certificate certs --wait 2" in said
    assert "error: certs has no server.pem" in said


def test_a_finished_run_is_said_to_be_and_one_whose_page_is_still_there_can_be_stopped(run, capsys):
    (run / "status").write_text("done\n")
    out = ["latest", "--out", str(run.parent)]
    assert "which is done: nothing to stop" in refused(capsys, "fleet", "stop", *out)
    fleet_run.word(run, lingers=True, said=2 * status.SILENT)  # its server was killed
    refused(capsys, "fleet", "stop", *out)
    fleet_run.word(run, lingers=True)
    assert main(["fleet", "status", *out]) == main(["fleet", "stop", *out]) == 0
    said = capsys.readouterr().err
    assert "its page is still shown; last heard" in said
    assert "asked: its page ends" in said
    assert status.take_stop(run, "5e55")


def test_of_a_sealed_run_a_devices_bytes_are_its_part_of_the_sum(run):
    with (run / "run.toml").open("a") as file:
        file.write('privacy = "sealed"\n')
    shown = {d.name: (d.bytes_up, d.bytes_down) for d in status.look(run).devices}
    assert shown == {"bakery": (330, 264), "dialysis-ward": (0, 0), EVIL: (0, 0)}  # one good reply in round 2


def test_a_device_that_came_after_the_end_stays_known(run):
    devices = [{"name": "bakery", "client": 0, "does": LATE}, {"name": "x", "client": 1, "does": "ready"}]
    fleet_run.word(run, devices=devices)
    assert [d.does for d in status.look(run).devices] == [LATE, ""]


def test_what_goes_on_with_it_is_said_of_a_compression_and_an_evaluation_too(run, capsys):
    assert status.resume(run) == f"fleetune fleet serve --resume {run}"
    (run / "status").write_text("done\n")
    assert status.resume(run) == f"fleetune fleet eval {run}"
    fleet_run.word(run, measures=False)
    assert status.resume(run) == f"fleetune eval {run}"
    smaller = run.parent / "0009-optq-tiny"
    smaller.mkdir()
    compression_folder.write_record(smaller, compression_folder.CompressRequest(str(run), True, "optq"), None)
    fleet_run.word(smaller)
    Devices(smaller).register([("ab" * 32, "press-3")])
    now = status.look(smaller)
    assert (now.status, status.resume(smaller)) == ("interrupted", f"fleetune compress --resume {smaller}")
    assert main(["fleet", "devices", str(smaller)]) == 0
    assert "press-3" in capsys.readouterr().out


def test_resume_takes_no_part_of_a_recipe(run, capsys):
    for more in (["--rounds", "3"], ["-c", "recipe.toml"], ["--set", "K=4"]):
        said = refused(capsys, "fleet", "serve", "--resume", "latest", "--out", str(run.parent), *more)
        assert "follows the run's own recipe" in said
        assert f"fleetune fleet serve --resume {run}" in said
