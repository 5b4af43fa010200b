# SPDX-License-Identifier: Apache-2.0
"""The live page over HTTP: who may read it, what it says, that nothing of a device's words becomes markup; and the metrics."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest
from fleet_run import EVIL, front, run
from prometheus_client.parser import text_string_to_metric_families
from serve_harness import ask, error_of

from fleetune.cli.main import main
from fleetune.common.events import DeviceShown
from fleetune.common.extras import pip_install
from fleetune.errors import UsageError
from fleetune.fleet import page, prometheus, status
from fleetune.fleet.page import LivePage, PagePlace

__all__ = ["front", "run"]  # fixtures

PATHS = ("/parts", "/status", "/metrics")


def test_the_page_and_what_it_asks_for(front, run):
    code, headers, body = ask(front, "GET", "/")
    assert code == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert b"bakery" not in body  # it holds nothing of the run
    code, _, body = ask(front, "GET", "/parts")
    parts = json.loads(body)
    assert code == 200
    assert list(parts)[:4] == ["title", "head", "devices", "result"]
    assert parts["title"] == "round 3 of 8 · loss 3.600 · 0001-fedkseed-tiny"
    assert "samples" not in parts  # they hold rows of clients
    assert "Validation loss by round" in parts["course"]
    code, _, body = ask(front, "GET", "/status")
    assert json.loads(body)["states"] == {"at work": 1, "ready": 1, "away": 1}


def test_what_devices_are_called_and_say_is_no_markup(front):
    parts = json.loads(ask(front, "GET", "/parts")[2])
    assert EVIL not in "".join(parts.values())
    assert parts["devices"].count("&lt;img src=x onerror=window.hit=1&gt;") == 2  # a name and a reason
    tags = set(re.findall(r"<([a-z0-9]+)", "".join(parts.values())))
    assert not tags & {"img", "script", "iframe", "a", "form", "style", "link", "object"}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/status", "/stop"])
def test_nothing_can_be_changed(front, method, path):
    code, headers, body = ask(front, method, path)
    assert (code, headers["Allow"], error_of(body)["code"]) == (405, "GET", "method_not_allowed")


def test_other_paths_hosts_and_origins_are_refused(front):
    assert ask(front, "GET", "/../status")[0] == 404
    assert ask(front, "GET", "/report.html")[0] == 404
    for path in ("/", *PATHS):
        assert error_of(ask(front, "GET", path, Host="rebound.example")[2])["code"] == "wrong_host"
        assert error_of(ask(front, "GET", path, Origin="http://evil.example")[2])["code"] == "wrong_origin"


def test_with_a_token_nothing_of_the_run_is_to_be_had_without_it(run):
    live = LivePage()
    with page.listening("127.0.0.1", 0, "secret", live) as front:
        live.show(run)
        assert ask(front, "GET", "/")[0] == 200
        for path in (*PATHS, "/nowhere"):
            for given in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
                assert ask(front, "GET", path, **given)[0] == 401
        for path in PATHS:
            assert ask(front, "GET", path, Authorization="Bearer secret")[0] == 200


def test_off_the_loopback_address_a_token_is_made_and_printed(run, monkeypatch):
    monkeypatch.delenv("FLEETUNE_TOKEN", raising=False)
    notes: list[str] = []
    with page.opened(PagePlace("0.0.0.0", 0), notes.append) as live:
        live.show(run)
        token = notes[0].partition("#")[2]
        assert len(token) >= 32
        assert "unencrypted" in notes[1]
    notes.clear()
    with page.opened(PagePlace("127.0.0.1", 0), notes.append):
        assert re.fullmatch(r"page: http://127\.0\.0\.1:\d+/", notes[0])


def test_before_the_run_and_where_a_file_is_damaged_it_says_so(run):
    live = LivePage()
    with page.listening("127.0.0.1", 0, "", live) as front:
        for path in PATHS:
            code, _, body = ask(front, "GET", path)
            assert (code, error_of(body)["code"]) == (503, "loading")
        live.show(run)
        (run / "fleet.json").write_text("{")
        code, _, body = ask(front, "GET", "/status")
        assert (code, error_of(body)["code"]) == (503, "not_ready")


def test_an_answer_is_given_again_while_it_is_fresh(monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(page, "FRESH", 0.0)
    monkeypatch.setattr(page, "REST", 1e9)  # the next is made after so many times what this one took
    cached = page._Cached(lambda: calls.append(1) or len(calls))
    assert [cached(), cached(), cached()] == [1, 1, 1]
    monkeypatch.setattr(page, "REST", 0.0)
    again = page._Cached(lambda: calls.append(1) or len(calls))
    assert [again(), again()] == [2, 3]


def test_of_many_devices_those_with_trouble_are_shown(run):
    now = status.look(run)
    many = [DeviceShown(client=c, name=f"d{c}", does="away" if c == 900 else "ready") for c in range(1000)]
    html = page.devices(dataclasses.replace(now, devices=many))
    assert html.count("<tr>") == 1 + page.MOST_DEVICES
    assert "d900" in html
    assert "800 more devices" in html


def test_prometheus_reads_the_metrics(front, run):
    code, headers, body = ask(front, "GET", "/metrics")
    assert code == 200
    assert headers["Content-Type"] == prometheus.TYPE
    found = {
        (s.name, *sorted(s.labels.values())): s.value
        for family in text_string_to_metric_families(body.decode())
        for s in family.samples
    }
    assert found["fleetune_run_info", "0001-fedkseed-tiny"] == 1
    assert (found["fleetune_round",], found["fleetune_rounds",]) == (3, 8)
    assert found["fleetune_devices", "away"] == 1
    assert found["fleetune_devices", "joining"] == 0
    assert found["fleetune_replies_total", "ok"] == 4
    assert found["fleetune_replies_total", "dropped"] == 1
    assert found["fleetune_traffic_bytes_total", "up"] == 660
    assert found["fleetune_round_seconds",] == 2.5
    assert math.isclose(found["fleetune_validation_loss",], 3.6)
    assert found["fleetune_server_memory_bytes",] == 5e8
    assert not any("bakery" in str(key) for key in found)  # no series for each device


def test_without_the_library_metrics_say_how_to_install_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UsageError) as caught:
        prometheus.text(status.look(run))
    assert pip_install("fleet") in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", ("127.0.0.1", 8471)),
        ("9000", ("127.0.0.1", 9000)),
        ("0.0.0.0:9", ("0.0.0.0", 9)),
        ("[::1]:9", ("::1", 9)),
    ],
)
def test_where_the_page_is(text, place):
    found = PagePlace.of(text, None)
    assert (found.host, found.port) == place


@pytest.mark.parametrize("text", ["latest", "host", "host:", ":9", "9x"])
def test_where_no_page_can_be(text):
    with pytest.raises(UsageError, match="is not a port"):
        PagePlace.of(text, None)


def test_a_token_without_a_page_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text('model = "tiny"\ndata = "demo"\n')
    assert main(["fleet", "serve", "-c", "recipe.toml", "--page-token", "x"]) == 2
    assert "give --page as well" in capsys.readouterr().err
