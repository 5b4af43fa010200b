"""What a server or a device cannot be told is refused before any work, with the reason."""

import importlib.util
import socket
from pathlib import Path

import pytest
from test_loopback import FEDKSEED, folder, place

from command_line import ok, refused
from fleetune.cli import flags
from fleetune.cli.main import build_parser, main
from fleetune.common.shell import pip_install
from fleetune.errors import FleetError, UsageError
from fleetune.fleet import device as devices_module
from fleetune.fleet import keys
from fleetune.fleet.server import Place, Served
from fleetune.tuning.recipe import recipe as recipes

__all__ = ["folder", "place"]  # fixtures


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("serve -c recipe.toml --host 0.0.0.0", "needs TLS and registered keys"),
        ("serve -c recipe.toml --keys nowhere", "has no public keys"),
        ("serve -c recipe.toml --certificate model", "has no server.pem"),
        ("serve -c recipe.toml --port 0 --keys keys --wait 9", "9 devices, and 3 keys"),
        ("serve -c recipe.toml --grace -1", "cannot be negative"),
        ("serve more", "takes no 'more'"),
        ("serve", "fleetune fleet serve -c recipe.toml"),
        ("status", "status takes one"),
        ("eval model --rounds 3", "eval takes no rounds"),
        ("eval model --host 0.0.0.0", "needs TLS and registered keys"),
        ("eval model --wait -1", "cannot be negative"),
        ("join 127.0.0.1:1 --data rows.jsonl --held-out 1.5", "must be a whole number of rows"),
        ("join 127.0.0.1:1 --data rows.jsonl --held-out nan", "must be a whole number of rows"),
        ("join 127.0.0.1:1 --data rows.jsonl --held-out 1 --eval-data x", "both given"),
        ("join 127.0.0.1:1 --data rows.jsonl --max-load 50", "no share of the processors"),
        ("join 192.168.1.9:8470 --data rows.jsonl", "with TLS alone"),
        ("join nowhere --data rows.jsonl", "is not HOST:PORT"),
        ("join 127.0.0.1:99999 --data rows.jsonl", "is not HOST:PORT"),
        ("join 127.0.0.1:0 --data rows.jsonl", "is not HOST:PORT"),
        ("join ::1:23575 --data rows.jsonl", "[::1]:8470"),
        ("join 127.0.0.1:1", "which rows"),
        ("join 127.0.0.1:1 --data rows.jsonl --rounds 3", "rounds is the server's to say"),
        ("join 127.0.0.1:1 --data rows.jsonl --key rows.jsonl", "not an OpenSSH key"),
        ("keys new dev-0", "is there already"),
        ("keys certificate certs localhost", "is there already"),
        ("keys", "keys takes"),
        ("split -c recipe.toml", "where to"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(place, capsys, words, what):
    Path("recipe.toml").write_text(recipes.to_toml(recipes.make(FEDKSEED)))
    assert main(["fleet", *words.split()]) in (2, 4)
    assert what in capsys.readouterr().err


def test_serving_can_be_tried_without_a_device(place, capsys):
    Path("recipe.toml").write_text(recipes.to_toml(recipes.make(FEDKSEED)))
    before = sorted(Path().rglob("*"))
    door = ["--port", "7", "--keys", "keys", "--certificate", "certs"]
    (found,) = ok(capsys, "fleet", "serve", "-c", "recipe.toml", "--dry-run", *door)
    assert (found["clients"], found["held_out"]) == (3, 4)
    assert main(["fleet", "serve", "-c", "recipe.toml", "--dry-run", *door]) == 0
    said = capsys.readouterr().err
    assert "127.0.0.1:7 · TLS, registered keys · 3 devices" in said
    assert "measures on 4 rows of rows.jsonl and uses no other" in said
    assert sorted(Path().rglob("*")) == before


def test_an_evaluation_opens_the_door_of_its_run_where_no_flag_says_otherwise():
    args = build_parser("fleet").parse_args(["fleet", "eval", "latest", "--certificate", "new"])
    taken = flags.again(args, " --port 9 --keys 'my keys' --certificate certs --wait 3 --grace 20")
    assert taken == ["--port 9", "--keys 'my keys'"]
    assert (args.host, args.port, args.keys, args.certificate) == (None, 9, "my keys", "new")
    assert (args.wait, args.grace) == (None, None)  # of the run, not of what follows it


def test_a_certificate_has_the_file_that_devices_trust_beside_it(place):
    Path("certs/ca.pem").rename("ca.pem")
    try:
        with pytest.raises(UsageError, match=r"has no ca\.pem"):
            Place(certificate=Path("certs")).check()
    finally:
        Path("ca.pem").rename("certs/ca.pem")


def test_the_line_for_devices_names_the_server_as_its_certificate_does(place):
    assert Served(Place("0.0.0.0", 8470, Path("keys"), Path("certs"))).line() == (
        "fleetune fleet join localhost:8470 --data ROWS.jsonl --key KEY --ca ca.pem"
    )
    keys.make_certificate(Path("both"), ["localhost", "fleet.example.org"])
    assert Served(Place("0.0.0.0", 8470, Path("keys"), Path("both"))).line(own_model=True) == (
        "fleetune fleet join fleet.example.org:8470 --data ROWS.jsonl --model PATH --key KEY --ca ca.pem"
    )
    assert keys.hosts_of(Path("certs/server.pem")) == ["localhost", "127.0.0.1"]
    Path("odd").mkdir()
    for name in ("server.pem", "server.key"):
        (Path("odd") / name).write_bytes(Path("certs/ca.pem").read_bytes())
    with pytest.raises(UsageError, match="no certificate of a server"):
        Served(Place("0.0.0.0", 8470, Path("keys"), Path("odd")))


def test_a_device_reads_its_rows_before_it_looks_for_a_server(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no file rows.jsonl" in refused(capsys, "fleet", "join", "127.0.0.1:1", "--data", "rows.jsonl")
    Path("rows.jsonl").write_text('{"ask": "Why?", "say": "So."}\n')
    assert "rows.jsonl has the columns of no form" in refused(
        capsys, "fleet", "join", "127.0.0.1:1", "--data", "rows.jsonl"
    )


@pytest.mark.parametrize("missing", ["cryptography", "uvicorn"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, missing):
    find = importlib.util.find_spec
    without = lambda name, *more: None if name == missing else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(UsageError, match=missing) as caught:
        Served(Place())
    assert pip_install("fleet") in str(caught.value.hint)


def test_a_port_in_use_and_a_second_process_of_a_device_are_refused(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = Place("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(FleetError, match="cannot listen"), Served(place):
            pass
    with devices_module._alone(Path("one")), pytest.raises(FleetError, match="another process"):
        devices_module._alone(Path("one"))
