"""All that a device needs in one file; and a device's settings in a file."""

import argparse
import base64
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from command_line import refused
from fleetune.cli.commands import fleet as command
from fleetune.cli.main import build_parser, main
from fleetune.errors import RecipeError, UsageError
from fleetune.fleet import device, keys

NAMES = ["localhost", "fleet.example.org"]


def locked() -> str:
    """Return a private key that is encrypted in a way that nobody knows."""
    key, _ = keys.generated()
    raw = base64.b64decode(b"".join(key.splitlines()[1:-1])).replace(b"none", b"what")
    begin, end = (f"-----{word} OPENSSH PRIVATE KEY-----\n" for word in ("BEGIN", "END"))
    return begin + base64.encodebytes(raw).decode() + end


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    keys.make_certificate(Path("certs"), NAMES)
    return tmp_path


def invited(name: str = "press-3", *more: str) -> int:
    return main(["fleet", "invite", name, "--keys", "keys", "--certificate", "certs", *more])


def test_an_invite_registers_a_key_and_is_all_that_its_device_needs(place, capsys):
    assert invited() == 0
    file = Path("press-3.invite")
    assert file.stat().st_mode & 0o777 == 0o600
    assert "private key" in capsys.readouterr().out
    address, ca = keys.accept_invite(file, Path("state"))
    assert address == "fleet.example.org:8470"
    assert ca is not None
    assert ca.read_bytes() == Path("certs/ca.pem").read_bytes()
    own = keys.read(Path("state/key"))
    (known,), _ = keys.registered(Path("keys"))
    assert (known.name, known.pem) == ("press-3", own.public.pem)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in Path("state").iterdir())
    assert keys.accept_invite(file, Path("state")) == (address, ca)  # at the next start
    assert invited("press-4", "--host", "localhost", "--port", "7") == 0
    assert keys.accept_invite(Path("press-4.invite"), Path("other"))[0] == "localhost:7"


def test_an_invite_needs_no_torch(place):
    words = "fleet invite press-3 --keys keys --certificate certs"
    code = f'import sys; from fleetune.cli.main import main; main({words.split()}); print("torch" in sys.modules)'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("\nFalse\n"), done.stderr


def test_nothing_is_replaced(place):
    assert invited() == 0
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert invited() == 2
    Path("press-3.invite").rename("elsewhere")
    assert invited() == 2  # the key is registered
    Path("elsewhere").rename("press-3.invite")
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    keys.make(Path("state/key"))
    mine = Path("state/key").read_bytes()
    with pytest.raises(UsageError, match="is not replaced"):
        keys.accept_invite(Path("press-3.invite"), Path("state"))
    assert Path("state/key").read_bytes() == mine
    assert not Path("state/ca.pem").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"key": "no key"},
        {"key": locked()},
        {"ca": "no certificate"},
        {"address": 7},
        {"address": "[::1%@[::ffff:192.0.2.2]:8470"},
        {"v": 2},
        {"more": "state/secret"},
        {"key": None},
    ],
)
def test_what_is_no_invite_writes_nothing(place, change):
    assert invited() == 0
    found = json.loads(Path("press-3.invite").read_text()) | change
    Path("odd.invite").write_text(json.dumps(found))
    with pytest.raises(UsageError, match="no invite"):
        keys.accept_invite(Path("odd.invite"), Path("state"))
    assert not Path("state").exists()


@pytest.mark.parametrize("content", [None, b"\xff", 2])
def test_an_invite_is_made_for_one_certificate_that_can_be_read(place, capsys, content):
    ca = Path("certs/ca.pem")
    own = ca.read_bytes()
    ca.unlink()
    if content is not None:
        ca.write_bytes(own * content if isinstance(content, int) else content)
    assert "certificate" in refused(
        capsys, "fleet", "invite", "n", "--keys", "keys", "--certificate", "certs"
    )
    assert not Path("n.invite").exists()


@pytest.mark.parametrize(
    "host", ["[::1%@[::ffff:192.0.2.2]", "user@127.0.0.1", "a/b", "a b", "a\n", "a#", "[g]", ""]
)
def test_a_host_is_a_name_or_an_address_alone(host):
    with pytest.raises(UsageError, match="HOST:PORT"):
        keys.host_in(f"{host}:8470")
    assert not keys.is_loopback(host)


@pytest.mark.parametrize("host", ["localhost", "a_b.example-1.org", "127.0.0.1", "[::1]"])
def test_a_host_is_found(host):
    assert keys.host_in(f"{host}:8470") == host


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("invite ../x/.. --keys keys --certificate certs", "no name of a device"),
        ("invite press-3 --certificate certs", "--keys DIR"),
        ("invite press-3 --keys keys --host 10.0.0.1", "needs TLS"),
        ("invite press-3 --keys keys --host 10.0.0.1 --certificate certs", "is not for 10.0.0.1"),
        ("join none.invite --data rows.jsonl", "cannot read none.invite"),
        ("join none.invite --data rows.jsonl --key k", "of its own"),
        ("join 127.0.0.1:1 --data rows.jsonl --dry-run", "is for a new run"),
    ],
)
def test_what_cannot_be_is_refused(place, capsys, words, what):
    assert what in refused(capsys, "fleet", *words.split())
    assert not Path("press-3.invite").exists()


def test_a_device_joins_by_its_invite_and_by_its_settings(place, capsys, monkeypatch):
    asked: list[tuple[str, object, object, object]] = []

    def joined(server, brings, home, *, stop, note, conditions):
        asked.append((server, brings, home, conditions))
        return "the run is finished"

    monkeypatch.setattr(device, "join", joined)
    assert invited() == 0
    Path("press-3.invite").chmod(0o644)
    Path("device.toml").write_text(
        'server = "press-3.invite"\ndata = "rows.csv"\nram = "2GB"\nheld_out = 0.1\nthreads = 2\n'
        'state = "mine"\ncalibrate = true\nmax_load = 0.5\n'
    )
    assert main(["fleet", "join", "-c", "device.toml", "--threads", "1"]) == 0
    assert "others on this machine can read the private key" in capsys.readouterr().err
    ((server, brings, home, conditions),) = asked
    assert server == "fleet.example.org:8470"
    assert (brings.data, brings.memory, brings.held_out, brings.threads) == ("rows.csv", 2 * 10**9, 0.1, 1)
    assert (brings.calibrate, conditions.max_load) == (True, 0.5)
    assert (home.state, home.key, home.ca) == (Path("mine"), None, Path("mine/ca.pem"))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("stat = 'x'", "no setting 'stat' of a device. Did you mean 'state'"),
        ("rounds = 3", "no setting 'rounds'"),
        ("calibrate = 1", "of another kind"),
        ("max_load = true", "of another kind"),
        ("data = ['a']", "of another kind"),
        ("data = ", "is not TOML"),
    ],
)
def test_settings_that_are_none_are_errors(tmp_path, text, what):
    (tmp_path / "device.toml").write_text(text)
    args: argparse.Namespace = build_parser("fleet").parse_args(["fleet", "join"])
    with pytest.raises(RecipeError, match=what):
        command._take_settings(args, tmp_path / "device.toml")


def test_a_qr_code_is_drawn_two_rows_a_line(monkeypatch):
    assert keys.drawn([[1, 0], [0, 1], [1, 1]]) == "▄▀\n▄▄\n"
    monkeypatch.setitem(sys.modules, "segno", None)
    assert keys.qr_code("x") == ""
    made = types.SimpleNamespace(matrix_iter=lambda border: iter([b"\1\0", b"\1\0"]))
    monkeypatch.setitem(sys.modules, "segno", types.SimpleNamespace(make=lambda *_, **__: made))
    assert keys.qr_code("x") == " █\n"
