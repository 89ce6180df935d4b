"""Signatures over a bank's whole folder, and what a caller demands of a bank before anything of it is read.

A digest says that a bank is what its manifest says; a signature says whose manifest that is. Sigstore's ``model-signing``
(optional: ``pip install 'amlora-dist[sign]'``) makes and checks them, with a key and without a network: ``model.sig`` in
the bank's folder holds the sha256 of every file but those that nobody's loader reads (``README.md``, what MLflow and the Hub
add). A version's signature lies among its artifacts, over the folder that ``amlora pull --statistics`` makes.

Keys are elliptic curves' in PEM files::

    openssl ecparam -genkey -name prime256v1 -noout -out bank.key && openssl ec -in bank.key -pubout -out bank.pub
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amlora_dist.errors import BankError, UserError, plain_reason
from amlora_dist.files import write_bytes
from amlora_dist.registry.bank_files import README_FILE, SIGNATURE_FILE
from amlora_dist.registry.bank_folder import Bank, read_bank
from amlora_dist.registry.manifest import FILE, MAX_BYTES, parse_manifest, read_manifest

CURVES = ("secp256r1", "secp384r1", "secp521r1")
"""Elliptic curves whose keys the library takes; OpenSSL calls the first one prime256v1."""
EXTRA = "pip install 'amlora-dist[sign]'"
_IGNORED = (SIGNATURE_FILE, README_FILE, "registered_model_meta", ".gitattributes", ".cache")
FINDER = ".DS_Store"
"""Lies in any folder that somebody has looked at on a Mac."""


@dataclass(frozen=True, slots=True)
class Trust:
    """What is demanded of a bank; nothing, by default."""

    key: Path | None = None
    """PEM of the public key that must have signed it."""
    digest: str | None = None
    """Of its manifest."""

    @classmethod
    def of(cls, require_signature: str | Path | None = None, expect_digest: str | None = None) -> Trust:
        """From a caller's options, checked before anything is fetched.

        Raises:
            UserError: no such key, no digest, or the library is not installed.
        """
        if expect_digest is not None and not re.fullmatch(r"[0-9a-f]{64}", expect_digest):
            raise UserError(
                f"--expect-digest: found {expect_digest!r}, expected the 64 hexadecimal digits that `amlora verify` prints"
            )
        if require_signature is None:
            return cls(None, expect_digest)
        key = Path(require_signature).expanduser().absolute()
        _library("--require-signature")
        _check_key(key, "--require-signature", public=True)
        return cls(key, expect_digest)

    @property
    def any(self) -> bool:
        return self.key is not None or self.digest is not None

    def check(self, folder: Path) -> None:
        """See that the bank in a folder is what is demanded.

        Raises:
            BankError: it is not signed, not by this key, was changed since, or has another digest.
        """
        self._trusted(folder)

    def read(self, folder: Path, *, statistics: bool = True) -> Bank:
        """The bank in a folder, if it is what is demanded: what was checked is what is read, whoever writes there then.

        Raises:
            BankError: as ``check`` and ``read_bank``.
        """
        trusted = self._trusted(folder)
        bank = read_bank(folder, statistics=statistics)
        for digest in trusted:
            if bank.manifest.digest() != digest:
                raise BankError(f"{folder}: was changed by somebody while it was read; fetch the bank again")
        return bank

    def _trusted(self, folder: Path) -> list[str]:
        """Digests that the manifest must have: the one that is expected, and that of the one that was signed."""
        if self.digest is not None and (found := read_manifest(folder).digest()) != self.digest:
            raise BankError(f"{folder}: digest: found {found}, expected {self.digest} (--expect-digest): another bank")
        expected = [] if self.digest is None else [self.digest]
        return expected if self.key is None else [*expected, _signed(folder, self.key)]


def sign(folder: Path, key: Path) -> Path:
    """Sign a bank's folder with a private key; the place of the signature.

    Raises:
        UserError: no such key, or the library is not installed.
    """
    library = _library("amlora sign")
    _check_key(key, "--key", public=False)
    target = folder / SIGNATURE_FILE
    with tempfile.TemporaryDirectory(prefix="amlora-signature-") as tmp:
        part = Path(tmp) / SIGNATURE_FILE
        try:
            signer = library.signing.Config().use_elliptic_key_signer(private_key=key)
            signer.set_hashing_config(_hashing(library, folder)).sign(folder.resolve(), part)
        except (ValueError, TypeError) as error:
            raise UserError(f"{folder}: cannot be signed ({error})") from error
        try:
            write_bytes(target, part.read_bytes())  # only now an earlier one goes
        except OSError as error:
            raise UserError(f"{target}: cannot be written ({plain_reason(error)}); make room for that file") from error
    return target


def _signed(folder: Path, key: Path) -> str:
    """The digest of the manifest of a folder that a key has signed."""
    library = _library("--require-signature")
    signature = folder / SIGNATURE_FILE
    if not signature.is_file() or signature.is_symlink():
        raise BankError(f"{folder}: not signed (no {SIGNATURE_FILE}), and --require-signature asks for it: amlora sign")
    if (size := signature.stat().st_size) > MAX_BYTES:
        raise BankError(f"{signature}: found {size} bytes, expected at most {MAX_BYTES}; fetch the bank again")
    from cryptography.exceptions import InvalidSignature

    try:
        with tempfile.TemporaryDirectory(prefix="amlora-signature-") as tmp:
            own = Path(tmp) / SIGNATURE_FILE  # nobody else's: what is verified is what is read
            own.write_bytes(signature.read_bytes())
            verifier = library.verifying.Config().use_elliptic_key_verifier(public_key=key)
            with contextlib.redirect_stdout(sys.stderr):  # it warns there of signatures that name no key
                verifier.set_hashing_config(_hashing(library, folder)).verify(folder.resolve(), own)
            payload = json.loads(base64.b64decode(json.loads(own.read_bytes())["dsseEnvelope"]["payload"]))
        signed = {one["name"]: one["digest"] for one in payload["predicate"]["resources"]}
        text = (folder / FILE).read_bytes()
        if hashlib.sha256(text).hexdigest() != signed[FILE]:
            raise ValueError(f"{FILE} was changed meanwhile")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OSError, InvalidSignature) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BankError(
            f"{folder}: its signature does not hold under {key} ({reason}): not by this key, or changed since"
            + _without_statistics(folder)
        ) from error
    return parse_manifest(text.decode(), str(folder / FILE)).digest()


def _without_statistics(folder: Path) -> str:
    """What to do about a bank that was pulled without a part that its signature is over."""
    with contextlib.suppress(BankError):
        if any(not (folder / part.file).exists() for part in read_manifest(folder).statistics):
            return "; it lacks statistics, which are signed too: pull the bank with --statistics"
    return ""


def _hashing(library: Any, folder: Path) -> Any:
    ignored = [*_IGNORED, *(path.relative_to(folder) for path in folder.rglob(FINDER) if path.is_file())]
    return library.hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=True).set_allow_symlinks(False)


def _library(who: str) -> Any:
    try:
        import model_signing
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise UserError(f"{who} needs {error.name}: {EXTRA}") from error
    return model_signing


def _check_key(key: Path, option: str, *, public: bool) -> None:
    """See that a file is a key that the library takes."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    kind = "public" if public else "private"
    try:
        if key.exists() and not key.is_file():
            raise UserError(f"{option}: found {key}, which is no file, expected the PEM of a {kind} key in one")
        text = key.read_bytes()
    except OSError as error:
        raise UserError(f"{option}: cannot read {key} ({plain_reason(error)}); expected a PEM file") from error
    if not re.search(rf"-----BEGIN [A-Z ]*{kind.upper()} KEY-----".encode(), text):
        raise UserError(f"{option}: found {key}, expected the PEM of a {kind} key")
    try:
        found: Any = load_pem_public_key(text) if public else load_pem_private_key(text, None)
    except TypeError:
        raise UserError(
            f"{option}: found {key}, which is locked with a password, expected one without: openssl ec -in {key} -out OTHER"
        ) from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"{option}: found {key}, expected the PEM of a {kind} key ({_first_line(error)})") from error
    own = isinstance(found, ec.EllipticCurvePublicKey if public else ec.EllipticCurvePrivateKey)
    curve = found.curve.name if own else None
    if curve not in CURVES:
        what = f"one of curve {curve}" if curve else "one of another kind"
        raise UserError(
            f"{option}: found {key}, {what}, expected an elliptic curve's {kind} key: {', '.join(CURVES)}"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:150]
