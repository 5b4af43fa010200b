"""Write a finished run as one signed folder, ready to upload, that anybody verifies with the base model alone.

SHA256SUMS lists all files.  Its signature, SHA256SUMS.sig, is ed25519 in OpenSSH's format (SSHSIG, PROTOCOL.sshsig; namespace
`file`), so `ssh-keygen -Y` checks it as well.
"""

import base64
import contextlib
import hashlib
import json
import os
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from fleetune.common import sums
from fleetune.common.display import check_installed, quoted
from fleetune.common.events import Released
from fleetune.common.files import PRIVATE, json_text, read_openssh_key, staged, storage_error, write_atomic
from fleetune.errors import ModelError, UsageError
from fleetune.runs import compression_folder, rundir
from fleetune.subject import Run
from fleetune.tuning.prepare import private
from fleetune.tuning.recipe import recipe as recipes
from fleetune.tuning.result import finished, foundations
from fleetune.tuning.run import describe, model_card

with contextlib.suppress(ImportError):  # of the extra `fleet`: `check_installed` says what is missing
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE: Final = sums.SIGNATURE
SIGNER: Final = "signer.pub"
NAMESPACE: Final = b"file"
HASH: Final = b"sha512"
OF: Final = "on the curve ed25519"
ARMOUR: Final = ("-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----")
# what is told of the first and the last event: no path, no client's name, no traffic, which tells how many took part
FACTS: Final = (
    "v event method model digest params trained clients rounds partition rows_per_client held_out base tuned rows result_bytes "
    "result_sha256 entries change_errors best start moved remarks answered"
)


def write(run: Run, out: Path | None = None, key: Path | None = None) -> Released:
    """Write the release of a finished run to the new folder `out` (default: inside the run), and sign it.

    `key` is an ed25519 key as `ssh-keygen -t ed25519` makes it, without a password; by default the user's own, made when it is
    first needed.  UsageError for a run without a result, a folder that exists, or a key that cannot be used.
    """
    check_installed("a signature", "fleet", "cryptography")
    result, place = run.result, out or run.folder / "release"
    if place.exists():
        raise UsageError(f"{place} exists already", hint="choose a new folder with --to, or remove it first")
    if (done := finished.stated_by(run.folder)) == {}:
        raise UsageError(f"{run.folder} is not finished", hint=f"fleetune tune --resume {quoted(run.folder)}")
    file = key or own_key()
    hint = "make one: ssh-keygen -t ed25519 -N '' -f FILE"
    load = partial(forms.load_ssh_private_key, password=None)
    secret = read_openssh_key(file, load, Ed25519PrivateKey, OF, hint)
    with staged(place) as folder:
        (folder / model_card.CARD).write_text(model_card.of_release(run.folder), encoding="utf-8")
        public: dict[str, Any] = {n: describe.public(getattr(run.recipe, n)) for n in describe.NAMED}
        public["set"] = {n: v for n, v in describe.settings_of(run.recipe).items() if n in run.recipe.set}
        (folder / "run.toml").write_text(recipes.to_toml(replace(run.recipe, **public)), encoding="utf-8")
        (folder / rundir.ENVIRONMENT).write_text(json_text(_environment(run)), encoding="utf-8")
        start = next((e for e in rundir.events(run.folder) if e["event"] == "start"), {})
        events = [{n: v for n, v in event.items() if n in FACTS.split()} for event in (start, done)]
        remarks = [model_card.public_text(str(remark)) for remark in done.get("remarks", ())]
        told = {"result": result.name, "remarks": remarks}
        lines = [events[0] | {"model": public["model"]}, events[1] | told]
        (folder / rundir.METRICS).write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
        if result.is_dir():
            shutil.copytree(result, folder / result.name)
        else:
            shutil.copyfile(result, folder / result.name)
        (folder / SIGNER).write_text(_openssh(secret.public_key()) + "\n", encoding="utf-8")
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        sums.write(folder, names)
        signed = (folder / sums.FILE).read_bytes()
        (folder / SIGNATURE).write_text(
            _armoured(secret.public_key(), secret.sign(_agreed(signed))), encoding="ascii"
        )
    size = compression_folder.size(place)
    return Released(folder=str(place), bytes=size, signer=fingerprint(secret.public_key()), key=str(file))


def check(folder: Path, signer: str = "") -> str:
    """Return the fingerprint of the key that signed a release.

    ModelError where the signature is not the key's, a file is not as it was signed or was not signed, or `signer` (a
    fingerprint, a public key or its file) is another key.
    """
    check_installed("a signature", "fleet", "cryptography")
    for name in (SIGNATURE, SIGNER, sums.FILE):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} is no release: it has no {name}", hint="get it again from its maker")
    hint = "get the release again, and the fingerprint from its maker"
    key = _public(folder / SIGNER)
    try:
        text = (folder / SIGNATURE).read_text(encoding="ascii")
        signature = base64.b64decode("".join(text.splitlines()[1:-1]))[-64:]
        if text != _armoured(key, signature):
            raise ValueError("not in the one form that it has")
        key.verify(signature, _agreed((folder / sums.FILE).read_bytes()))
    except (ValueError, OSError, InvalidSignature) as error:
        raise ModelError(
            f"{folder / SIGNATURE} is not the signature of {sums.FILE} by {SIGNER}", hint=hint
        ) from error
    if signer and (named := " ".join(signer.split()[:2])) not in (known := fingerprint(key), _openssh(key)):
        # a fingerprint is no name of a file, which anyone may lay there
        given = None if named.startswith(("SHA256:", "ssh-")) else Path(signer)
        if given is None or not given.is_file() or fingerprint(_public(given)) != known:
            raise ModelError(f"{folder} was signed by {known}, not by {signer}", hint=hint)
    if found := [words for _, words in sums.faults(folder)]:
        raise ModelError("\n  ".join(found), hint=hint)
    if odd := sums.unlisted(folder):
        raise ModelError(f"{folder / odd[0]} is not of the release: nobody signed it", hint="remove it")
    return fingerprint(key)


def _environment(run: Run) -> Mapping[str, Any]:
    """Return env.json without folders of this machine; of a private run without digests of rows, which would confirm a guess."""
    found = dict(foundations.environment_of(run.folder))
    left_out = [rundir.STARTED_IN]
    if run.recipe.privacy != private.NONE:
        left_out += ["data_sha256", "rows_sha256", "split_sha256"]
    found = {n: v for n, v in found.items() if n not in left_out}
    if isinstance(files := found.get("data_sha256"), dict):
        found["data_sha256"] = {describe.public(name): digest for name, digest in files.items()}
    return found


# ---------------------------------------------------------------- keys


def own_key() -> Path:
    """Return the user's own key, `$XDG_CONFIG_HOME/fleetune/release_ed25519`; it is made where there is none."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    path = Path(home) / "fleetune" / "release_ed25519"
    if path.exists():
        return path
    secret = Ed25519PrivateKey.generate()
    raw = secret.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.OpenSSH, forms.NoEncryption())
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise storage_error(error, path) from error
    write_atomic(path, raw, mode=PRIVATE)
    write_atomic(path.with_name(f"{path.name}.pub"), _openssh(secret.public_key()) + "\n")
    return path


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return a key's fingerprint as `ssh-keygen -l` prints it."""
    digest = hashlib.sha256(_wire(key)).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _public(path: Path) -> Ed25519PublicKey:
    load, hint = forms.load_ssh_public_key, "get it again"
    key: Ed25519PublicKey = read_openssh_key(path, load, Ed25519PublicKey, OF, hint, ModelError)
    return key


def _openssh(key: Ed25519PublicKey) -> str:
    return key.public_bytes(forms.Encoding.OpenSSH, forms.PublicFormat.OpenSSH).decode()


def _wire(key: Ed25519PublicKey) -> bytes:
    return base64.b64decode(_openssh(key).split()[1])


def _string(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _agreed(text: bytes) -> bytes:
    """Return what is signed of a text."""
    return b"SSHSIG" + b"".join(map(_string, (NAMESPACE, b"", HASH, hashlib.sha512(text).digest())))


def _armoured(key: Ed25519PublicKey, signature: bytes) -> str:
    own = _string(_string(b"ssh-ed25519") + _string(signature))
    blob = (
        b"SSHSIG" + (1).to_bytes(4, "big") + b"".join(map(_string, (_wire(key), NAMESPACE, b"", HASH))) + own
    )
    return "\n".join([ARMOUR[0], *textwrap.wrap(base64.b64encode(blob).decode(), 70), ARMOUR[1], ""])
