"""The live page over HTTP: who may read it, what it says, that nothing of a device's words becomes markup; and the metrics."""

import re
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import fleet_run
import httpx
import pytest
from devices_harness import free_port
from fleet_run import EVIL
from prometheus_client.parser import text_string_to_metric_families
from starlette.datastructures import URL
from starlette.requests import Request

from fleetune.errors import UsageError
from fleetune.fleet import keys, page
from fleetune.fleet.http_server import Address
from fleetune.fleet.page import LivePage
from fleetune.runs.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run that a server has."""
    folder = fleet_run.write(tmp_path / "0001-fedkseed-tiny")
    with RunDir(folder):
        yield folder


@pytest.fixture
def live(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LivePage]:
    monkeypatch.setattr(page, "FRESH", 0.0)
    monkeypatch.setattr(page, "REST", 0.0)
    shown = LivePage(Address("127.0.0.1", free_port()))
    shown.open()
    yield shown
    shown.close()


def get(live: LivePage, path: str = "", **head: str) -> httpx.Response:
    return httpx.get(live.url + path, headers=head, timeout=20)


def test_page_says_how_the_run_stands_in_three_forms(live, run):
    assert get(live).status_code == 503  # nothing is known yet
    live.run = run
    shown = get(live)
    assert (shown.status_code, shown.headers["refresh"]) == (200, "5")
    assert "round 3 of 8 · loss 3.600" in shown.text
    assert "default-src 'none'" in shown.text
    assert "Validation loss by round" in shown.text
    assert 'id="samples"' not in shown.text  # they hold rows of clients
    assert "go on where it stopped" not in shown.text
    heads = dict(re.findall(r'<th scope="col"( class="r")?>(does|loss|time)<', shown.text))
    assert heads == {"": "does", ' class="r"': "time"}
    now = get(live, "status").json()
    assert now["states"] == {"at work": 1, "ready": 1, "away": 1}
    families = {f.name: f for f in text_string_to_metric_families(get(live, "metrics").text)}
    assert families["fleetune_round"].samples[0].value == now["round"]
    assert {s.labels["state"]: s.value for s in families["fleetune_devices"].samples}["away"] == 1
    replies = {s.labels["status"]: s.value for s in families["fleetune_replies"].samples}
    assert replies == now["replies"]
    traffic = {s.labels["direction"]: s.value for s in families["fleetune_traffic_bytes"].samples}
    assert traffic == {"up": now["bytes_up"], "down": now["bytes_down"]}


def test_page_of_a_finished_run_says_so_and_is_loaded_no_more(live, run):
    live.run = run
    (run / "status").write_text("done\n")
    shown = get(live)
    assert "refresh" not in shown.headers
    assert "<title>finished · loss 3.600" in shown.text


def test_page_has_no_markup_of_a_devices_words(live, run):
    live.run = run
    shown = get(live).text
    assert EVIL not in shown
    assert shown.count("&lt;img src=x onerror=window.hit=1&gt;") >= 2  # a name and a reason
    assert not {"img", "script", "iframe", "form"} & set(re.findall(r"<([a-z0-9]+)", shown))


def test_page_changes_nothing_and_has_no_other_path(live):
    for method in ("POST", "PUT", "DELETE"):
        assert httpx.request(method, live.url).status_code == 405
    for path in ("stop", "report.html", "..%2fstatus", "fleet/exchange"):
        assert get(live, path).status_code == 404
    for host in ("[::1]:8471", "LOCALHOST"):
        assert get(live, "metrics", Host=host).status_code in (200, 503)
    for host in ("rebound.example", "[", ""):
        assert get(live, "metrics", Host=host).status_code == 400


def test_page_answers_a_path_whatever_the_host_is_said_to_be(live, run, monkeypatch):
    live.run = run
    monkeypatch.setattr(Request, "url", property(lambda request: URL("http://x/joined?/status")))
    assert get(live, "status").json()["round"] == 3


def test_page_with_a_password_says_nothing_without(run, tmp_path, monkeypatch):
    """With TLS, as it is off this machine; a wrong password costs time."""
    monkeypatch.setattr(page, "WRONG", 0.2)
    ca = keys.make_certificate(tmp_path / "certs", ["127.0.0.1"])
    files = tmp_path / "certs" / "server.pem", tmp_path / "certs" / "server.key"
    live = LivePage(Address("127.0.0.1", free_port(), *files), "sesame")
    live.open()
    live.run = run
    try:
        trust = ssl.create_default_context(cafile=str(ca))
        with httpx.Client(base_url=live.url, verify=trust) as http:
            assert live.url.startswith("https://")
            for path in ("", "status", "metrics", "nowhere"):
                assert http.get(path).status_code == 401
                known = http.get(path, auth=("me", "sesame"))
                assert known.status_code == (404 if path == "nowhere" else 200)
            began = time.monotonic()
            for wrong in ("", "sesam", "sesame2"):
                assert http.get("", auth=("me", wrong)).status_code == 401
            assert http.get("", headers={"Authorization": "Basic !"}).status_code == 401
            assert time.monotonic() - began > 0.8
            monkeypatch.setattr(page, "QUEUE", 0)
            assert http.get("", auth=("me", "sesam")).status_code == 429
            assert http.get("", auth=("me", "sesame")).status_code == 200
    finally:
        live.close()


PLACES = [("", "127.0.0.1", page.PORT), ("81", "127.0.0.1", 81), ("[::1]:81", "::1", 81)]


@pytest.mark.parametrize(("text", "host", "port"), [*PLACES, ("0.0.0.0:81", "0.0.0.0", 81)])
def test_place_reads_a_port_and_takes_the_fleets_certificate_off_this_machine(text, host, port):
    fleet = Address("0.0.0.0", 1, Path("server.pem"), Path("server.key"))
    got = page.place(text, fleet)
    certificate = fleet.certificate if host == "0.0.0.0" else None
    assert (got.host, got.port, got.certificate) == (host, port, certificate)
    assert LivePage(Address("10.0.0.1", 81, None, None)).password


@pytest.mark.parametrize(("text", "word"), [("x", "port"), (":81", "port"), ("0.0.0.0:81", "TLS")])
def test_place_refuses_what_is_none(text, word):
    with pytest.raises(UsageError, match=word):
        page.place(text, Address("127.0.0.1", 1))
    with pytest.raises(UsageError, match="password"):
        LivePage(Address("10.0.0.1", 81), "short")
