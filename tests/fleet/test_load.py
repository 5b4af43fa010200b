"""A door with very many devices that answer at once: `pytest -m slow -s tests/fleet/test_load.py` prints the table of docs/fleet.md."""

import asyncio
import multiprocessing
import os
import resource
import socket
import statistics
import time
from base64 import b64encode
from multiprocessing.connection import Connection

import pytest

from fleetune.fleet import door, keys
from fleetune.fleet.http_server import Address

ROUNDS = 5


def free_port() -> int:
    with socket.socket() as probe:  # test_loopback's would bring torch into the server's memory
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(port: int, count: int, size: int, said: Connection) -> None:
    """Give every device `ROUNDS` orders that end alike; say the seconds, the processor's seconds and the largest memory."""
    door.SESSIONS = count  # type: ignore[misc]
    here = door.Door(Address("127.0.0.1", port), None)
    here.open()
    said.send(None)
    while len(here.online()) < count:
        time.sleep(0.1)
    began, times = time.process_time(), []
    for _ in range(ROUNDS):
        start, body = time.monotonic(), os.urandom(size)
        waiting = {here.push(key, os.urandom(100) + body, size, 1 << 24) or "" for key in here.online()}
        while waiting:
            for number, answer in list(here.pull(waiting)):
                assert answer == body
                waiting.discard(number)
            time.sleep(0.01)
        times.append(time.monotonic() - start)
    spent = (time.process_time() - began) / ROUNDS / count
    said.send((statistics.median(times), spent, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


async def device(port: int, size: int) -> None:
    """Come in with a new key, and answer every order with its end."""
    from cryptography.hazmat.primitives.asymmetric import ec

    secret = ec.generate_private_key(ec.SECP384R1())
    key = keys.PrivateKey(secret, keys.PublicKey("", keys._pem(secret.public_key())))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def post(name: str, told: dict[str, str], body: bytes = b"") -> tuple[dict[str, str], bytes]:
        lines = "".join(f"{name}: {value}\r\n" for name, value in told.items())
        head = f"POST /fleet/{name} HTTP/1.1\r\nhost: x\r\n{lines}content-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        stated = dict(line.split(": ", 1) for line in answer[1:] if line)
        return stated, await reader.readexactly(int(stated.get("content-length", 0)))

    claim = {door.KEY: b64encode(key.public.pem).decode()}
    challenge = (await post("challenge", claim))[0][door.CHALLENGE]
    host = f"127.0.0.1:{port}"
    signature = b64encode(keys.sign(key, door.signed_text(host, "", challenge))).decode()
    claim |= {door.CHALLENGE: challenge, door.HOST: host, door.SIGNATURE: signature}
    head = {"authorization": f"Bearer {(await post('session', claim))[0][door.SESSION]}"}
    number, answer = "", b""
    while True:
        stated, order = await post("exchange", head | ({door.ORDER: number} if number else {}), answer)
        number, answer = stated.get(door.ORDER, ""), order[-size:]


def join(port: int, count: int, size: int) -> None:
    async def all_of_them() -> None:
        await asyncio.gather(*(device(port, size) for _ in range(count)), return_exceptions=True)

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(all_of_them())


@pytest.mark.slow
@pytest.mark.parametrize(("count", "size"), [(10, 64), (100, 64), (1000, 64), (1000, 393_216)])
def test_load_of_a_door(count, size):
    context, port = multiprocessing.get_context("spawn"), free_port()
    said, saying = context.Pipe()
    server = context.Process(target=serve, args=(port, count, size, saying), daemon=True)
    devices = context.Process(target=join, args=(port, count, size), daemon=True)
    server.start()
    try:
        said.recv()
        devices.start()
        seconds, spent, memory = said.recv()
    finally:
        server.kill()
        devices.kill()
    print(
        f"\n{count:5} devices, {size:6} bytes: {seconds:.2f} s per round, {1e3 * spent:.2f} ms of processor per device, {memory / 1e6:.0f} MB"
    )
    assert spent < 0.01
    assert memory < 2e9
