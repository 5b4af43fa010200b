"""Make and read the keys by which devices are known, and the certificate by which devices know their server.

A device's key is an OpenSSH key on the curve P-384 (`ssh-keygen -t ecdsa -b 384`); NAME.pub goes to the server's folder of keys.

NAME.invite has all that a device needs: {"v": 1, "address": HOST:PORT, "ca": PEM or "", "key": OpenSSH}, as JSON.  Whoever reads
it can be that device.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from fleetune.common import display
from fleetune.common.display import quoted
from fleetune.common.files import (
    PRIVATE,
    read_bytes,
    read_openssh_key,
    regular_private,
    storage_error,
    write_atomic,
)
from fleetune.errors import UsageError
from fleetune.fleet import PORT
from fleetune.tuning.rounds.sealed import Identity

with contextlib.suppress(ImportError):  # of the extra `fleet`: `check_installed` says what is missing
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

DAYS: Final = 3650  # that a certificate is valid
OF: Final = "on a NIST curve"
INVITE: Final = ".invite"
VERSION: Final = 1  # of an invite
FIELDS: Final = {"v": int, "address": str, "ca": str, "key": str}  # of an invite
LONGEST: Final = 1 << 16  # bytes of an invite
EVERY: Final = ("0.0.0.0", "::")  # addresses to listen on, by which nobody calls a machine
ANEW: Final = "get a new one: fleetune fleet invite NAME, on the server"


def fingerprint(pem: bytes) -> str:
    """Return the hash of a public key (PEM) by which a device is known: SHA-256, hexadecimal."""
    return hashlib.sha256(pem).hexdigest()


@dataclass(frozen=True)
class PublicKey:
    """A device's public key: its name (of the file, without .pub) and its bytes (PEM)."""

    name: str
    pem: bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of it, hexadecimal."""
        return fingerprint(self.pem)


@dataclass(frozen=True)
class PrivateKey:
    """A device's own key."""

    secret: ec.EllipticCurvePrivateKey
    public: PublicKey


def check_installed() -> None:
    """UsageError where the libraries of a real fleet are not there."""
    display.check_installed("a real fleet", "fleet", "cryptography", "httpx", "starlette", "uvicorn")


def sign(key: PrivateKey, text: bytes) -> bytes:
    """Return the ECDSA signature of a text, with SHA-256."""
    return key.secret.sign(text, ec.ECDSA(hashes.SHA256()))


def has_signed(key: PublicKey, signature: bytes, text: bytes) -> bool:
    """Tell whether a signature is this key's of this text; ValueError for a key that is none."""
    public = forms.load_pem_public_key(key.pem)
    if not isinstance(public, ec.EllipticCurvePublicKey) or _pem(public) != key.pem:
        raise ValueError("not a key on a NIST curve, or in another form than ours")
    try:
        public.verify(signature, text, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def identity(key: PrivateKey, peers: Path | None) -> Identity:
    """Return a device's own part in secure sums, with those whose public keys are in a folder (None: with any)."""
    known = {bytes.fromhex(public.fingerprint): public for public in registered(peers)[0]} if peers else None

    def trusts(name: bytes, text: bytes, signature: bytes) -> bool:
        return known is None or (name in known and has_signed(known[name], signature, text))

    return Identity(bytes.fromhex(key.public.fingerprint), lambda text: sign(key, text), trusts)


def make(path: Path) -> PrivateKey:
    """Make a key: `path`, for its owner alone, and `path`.pub; UsageError where there is one already."""
    if path.exists():
        raise UsageError(f"{path} is there already", hint="take another name; a key is not replaced")
    private, public = generated()
    _folder(path.parent)
    write_atomic(path, private, mode=PRIVATE)
    write_atomic(path.with_name(path.name + ".pub"), public + f" {path.name}\n".encode())
    return read(path)


def generated() -> tuple[bytes, bytes]:
    """Return a new key in OpenSSH's form: the private part, and the public one without a name."""
    secret = ec.generate_private_key(ec.SECP384R1())
    private = secret.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.OpenSSH, forms.NoEncryption())
    return private, secret.public_key().public_bytes(forms.Encoding.OpenSSH, forms.PublicFormat.OpenSSH)


def check_parts(key: bytes, ca: bytes) -> None:
    """ValueError where these are not a device's private key, and one certificate to trust or none."""
    if not isinstance(forms.load_ssh_private_key(key, password=None), ec.EllipticCurvePrivateKey):
        raise ValueError(f"its key is not {OF}")
    if ca and len(x509.load_pem_x509_certificates(ca)) != 1:
        raise ValueError("it has more than one certificate")


def read(path: Path) -> PrivateKey:
    """Read a device's key; UsageError where it is none."""
    hint = f"make one: fleetune fleet keys new {quoted(path)}"
    load = partial(forms.load_ssh_private_key, password=None)
    secret = read_openssh_key(path, load, ec.EllipticCurvePrivateKey, OF, hint)
    return PrivateKey(secret, PublicKey(path.name, _pem(secret.public_key())))


def registered(folder: Path) -> tuple[list[PublicKey], list[str]]:
    """Return the public keys in a folder (NAME.pub), by name, and what is wrong with others; UsageError where none is good."""
    found, wrong, hint = [], list[UsageError](), "make it with: fleetune fleet keys new"
    for path in sorted(folder.glob("*.pub")):
        try:
            public = read_openssh_key(path, forms.load_ssh_public_key, ec.EllipticCurvePublicKey, OF, hint)
            found.append(PublicKey(path.stem, _pem(public)))
        except UsageError as error:
            wrong.append(error)
    if wrong and not found:
        raise wrong[0]
    if not found:
        raise UsageError(
            f"{folder} has no public keys (NAME.pub)",
            hint="on a device: fleetune fleet keys new NAME; then bring NAME.pub here",
        )
    twins = {k.pem: k.name for k in found}
    if len(twins) < len(found):
        raise UsageError(f"a key is in {folder} under two names", hint="a device has one key, and one name")
    return found, [error.message for error in wrong]


def make_certificate(folder: Path, hosts: Sequence[str]) -> Path:
    """Make a server's certificate for these names and addresses: ca.pem for devices, server.pem and server.key.

    Returns ca.pem.  UsageError where there is one already.
    """
    if (folder / "ca.pem").exists():
        raise UsageError(f"{folder / 'ca.pem'} is there already", hint="take another folder")
    _folder(folder)
    now = datetime.datetime.now(datetime.UTC)

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def begun(subject: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("Fleetune fleet"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=DAYS))
        )

    ca, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    root = begun("Fleetune fleet", ca.public_key()).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    leaf = begun(hosts[0], server.public_key()).add_extension(names, critical=False)
    leaf = leaf.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    # strict clients ask for these three
    by = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key())
    leaf, root = leaf.add_extension(by, critical=False), root.add_extension(by, critical=False)
    root = root.add_extension(x509.SubjectKeyIdentifier.from_public_key(ca.public_key()), critical=False)
    root = root.add_extension(x509.KeyUsage(*(i == 5 for i in range(9))), critical=True)  # key_cert_sign
    pem = forms.Encoding.PEM
    secret = server.private_bytes(pem, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    write_atomic(folder / "server.key", secret, mode=PRIVATE)
    write_atomic(folder / "server.pem", leaf.sign(ca, hashes.SHA384()).public_bytes(pem))
    write_atomic(folder / "ca.pem", root.sign(ca, hashes.SHA384()).public_bytes(pem))
    return folder / "ca.pem"


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def hosts_of(certificate: Path) -> list[str]:
    """Return the names and addresses that a server's certificate (PEM) is for; UsageError where it is none."""
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound) as error:
        raise UsageError(
            f"{certificate} is no certificate of a server ({error})",
            hint="make one: fleetune fleet keys certificate DIR HOST",
        ) from error
    return [str(name.value) for name in names]


def authority(ca: Path) -> bytes:
    """Return the one certificate in a file (PEM) as DER; UsageError where there is none, or another beside it.

    A device says which one it trusts, and trusts no other: a server that it was given two for could be either.
    """
    try:
        found = x509.load_pem_x509_certificates(ca.read_bytes())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(
            f"cannot read the certificate {ca}: {why}",
            hint="--ca is the server's ca.pem, which is made beside server.pem",
        ) from error
    if len(found) != 1:
        raise UsageError(
            f"{ca} holds {len(found)} certificates", hint="--ca is that of one server: take out the others"
        )
    return found[0].public_bytes(forms.Encoding.DER)


def trusted(ca: Path | None) -> str:
    """Return SHA-256 of the certificate in a file, hexadecimal, as `authority`; "" where there is no file."""
    return "" if ca is None or not ca.is_file() else hashlib.sha256(authority(ca)).hexdigest()


def host_in(address: str) -> str:
    """Return the host of HOST:PORT, a name, an IPv4 address or an IPv6 address in brackets; UsageError for any other text.

    Whatever else a URL may hold (a user, a zone) could lead to another machine than the one that is checked.
    """
    found = re.fullmatch(
        r"([A-Za-z0-9_][A-Za-z0-9._-]{0,252}|\[[0-9A-Fa-f:.]+\]):(\d{1,5})", address, re.ASCII
    )
    if found is None or not 1 <= int(found[2]) <= 65535:
        raise UsageError(
            f"'{address}' is not HOST:PORT",
            hint=f"e.g. 192.168.1.10:{PORT}; of an IPv6 address: [::1]:{PORT}",
        )
    return found[1]


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which nobody else can reach."""
    if host == "localhost":
        return True
    try:
        return "%" not in host and ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "not writable", str(folder))
    except OSError as error:
        raise storage_error(error, folder) from error


def _pem(public: ec.EllipticCurvePublicKey) -> bytes:
    return public.public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)


def make_invite(file: Path, folder: Path, address: str, ca: Path | None) -> str:
    """Write a new device's invite, and its public key into a folder; return the text.  UsageError: nothing is replaced."""
    name = file.name.removesuffix(INVITE)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(f"'{name}' is no name of a device", hint="letters, digits, dots, - and _")
    public = folder / f"{name}.pub"
    for path in (file, public):
        if path.exists():
            raise UsageError(f"{path} is there already", hint="take another name; an invite replaces nothing")
    own, theirs = generated()
    trusted = x509.load_der_x509_certificate(authority(ca)).public_bytes(forms.Encoding.PEM) if ca else b""
    text = json.dumps({"v": VERSION, "address": address, "ca": trusted.decode(), "key": own.decode()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(file, "x", encoding="ascii", opener=regular_private) as opened:
            opened.write(text)
        write_atomic(public, theirs + f" {name}\n".encode())
    except OSError as error:
        raise storage_error(error, file) from error
    return text


def accept_invite(file: Path, state: Path) -> tuple[str, Path | None]:
    """Bring an invite's key and ca.pem into a device's state folder; return the server's address, and where ca.pem is.

    UsageError, with nothing written, for what is no invite, and where the folder has another key or ca.pem.
    """
    found = _invite_in(file)
    wanted = {state / "key": found["key"], **({state / "ca.pem": found["ca"]} if found["ca"] else {})}
    there = {path for path in wanted if path.exists()}
    for path in there:
        if read_bytes(path) != wanted[path].encode():
            raise UsageError(
                f"{path} is not that of {file}, and is not replaced",
                hint="another folder for this device: --state DIR",
            )
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in wanted.keys() - there:
        write_atomic(path, wanted[path], mode=PRIVATE)
    return found["address"], state / "ca.pem" if found["ca"] else None


def _invite_in(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > LONGEST:
            raise ValueError("it is too long")
        found = json.loads(read_bytes(file))
        if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != FIELDS:
            raise ValueError(f"it has not the fields {', '.join(FIELDS)}")
        if found["v"] != VERSION:
            raise ValueError(f"it is one of version {found['v']}, for a newer Fleetune")
        host_in(found["address"])
        check_parts(found["key"].encode(), found["ca"].encode())
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}", hint=ANEW) from error
    except (
        Exception
    ) as error:  # also of `cryptography`, for a key with a password or of a kind that it does not know
        raise UsageError(f"{file} is no invite of a fleet: {error}", hint=ANEW) from error
    return found


def drawn(dark: Sequence[Sequence[int]]) -> str:
    """Return a QR code, whose modules are dark or not, as text: two rows a line, light ones lit."""
    rows = [*dark, *([[0] * len(dark[0])] if len(dark) % 2 else [])]
    pairs = zip(rows[::2], rows[1::2], strict=True)
    lines = ("".join("█▀▄ "[2 * bool(a) + bool(b)] for a, b in zip(*two, strict=True)) for two in pairs)
    return "".join(f"{line}\n" for line in lines)


def qr_code(text: str) -> str:
    """Return a text as a QR code, "" where segno is not installed."""
    with contextlib.suppress(ImportError):
        import segno

        return drawn([list(row) for row in segno.make(text, error="l", micro=False).matrix_iter(border=2)])
    return ""


@dataclass(frozen=True)
class Place:
    """Where a server listens, and whom it lets in."""

    host: str = "127.0.0.1"
    port: int = PORT
    keys: Path | None = None  # folder with the devices' public keys
    certificate: Path | None = None  # folder with server.pem, server.key and ca.pem

    def check(self) -> list[PublicKey] | None:
        """Return the registered keys, None for any; UsageError for a place that others reach without TLS and keys."""
        check_installed()
        if not is_loopback(self.host) and not (self.keys and self.certificate):
            raise UsageError(
                f"{self.host} can be reached from other machines: a fleet there needs TLS and registered keys",
                hint=f"fleetune fleet keys certificate certs {self.called()}; then: --certificate certs --keys DIR "
                "with the devices' public keys",
            )
        for name in ("server.pem", "server.key"):
            if self.certificate and not (self.certificate / name).is_file():
                raise UsageError(
                    f"{self.certificate} has no {name}",
                    hint=f"make it: fleetune fleet keys certificate {quoted(self.certificate)} {self.called()}",
                )
        if self.certificate:
            hosts_of(self.certificate / "server.pem")
            if not (self.certificate / "ca.pem").is_file():
                what = f"{self.certificate} has no ca.pem"
                raise UsageError(what, hint="put the one that devices trust beside server.pem")
        return registered(self.keys)[0] if self.keys else None

    def address(self) -> str:
        """Return HOST:PORT by which devices call it, by its certificate where it listens everywhere."""
        host = self.host
        if self.certificate and host in EVERY:
            names = hosts_of(self.certificate / "server.pem")
            host = next((name for name in names if not is_loopback(name)), names[0])
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def called(self) -> str:
        """Return by which name or address devices call it, as a command says it."""
        return "HOST [HOST ..]   (names and addresses that devices join)" if self.host in EVERY else self.host

    def flags(self) -> str:
        """Return the flags that open the same door again, each with a space before it."""
        usual = Place()
        given = [
            ("--host", self.host, usual.host),
            ("--port", self.port, usual.port),
            ("--keys", self.keys, None),
            ("--certificate", self.certificate, None),
        ]
        return "".join(f" {flag} {quoted(value)}" for flag, value, other in given if value != other)
