"""Signatures over a bank's whole folder, and what a caller demands of a bank before anything of it is read.

A digest says that a bank is what its manifest says; a signature says whose manifest that is. Sigstore's ``model-signing``
(optional: ``pip install 'amlora-dist[sign]'``) makes and checks them, with a key and without a network: ``model.sig`` in
the bank's folder holds the sha256 of every file but those that nobody's loader reads (``README.md``, what MLflow and the Hub
add). A version's signature lies among its artifacts, over the folder that ``amlora pull --statistics`` makes.

Keys are elliptic curves' in PEM files::

    openssl ecparam -genkey -name prime256v1 -noout -out bank.key && openssl ec -in bank.key -pubout -out bank.pub
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amlora_dist.errors import BankError, UserError
from amlora_dist.registry.bank_files import README_FILE, SIGNATURE_FILE
from amlora_dist.registry.manifest import read_manifest

EXTRA = "pip install 'amlora-dist[sign]'"
_IGNORED = (SIGNATURE_FILE, README_FILE, "registered_model_meta", ".gitattributes", ".cache", ".DS_Store")


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
        if self.digest is not None and (found := read_manifest(folder).digest()) != self.digest:
            raise BankError(f"{folder}: digest: found {found}, expected {self.digest} (--expect-digest): another bank")
        if self.key is not None:
            _verify(folder, self.key)


def sign(folder: Path, key: Path) -> Path:
    """Sign a bank's folder with a private key; the place of the signature.

    Raises:
        UserError: no such key, or the library is not installed.
    """
    library = _library("amlora sign")
    _check_key(key, "--key", public=False)
    target = folder / SIGNATURE_FILE
    target.unlink(missing_ok=True)
    try:
        signer = library.signing.Config().use_elliptic_key_signer(private_key=key)
        signer.set_hashing_config(_hashing(library)).sign(folder, target)
    except (ValueError, TypeError, OSError) as error:
        target.unlink(missing_ok=True)
        raise UserError(
            f"--key: {key}: cannot sign with it ({error}); expected the PEM of an elliptic curve's key"
        ) from error
    return target


def _verify(folder: Path, key: Path) -> None:
    library = _library("--require-signature")
    signature = folder / SIGNATURE_FILE
    if not signature.is_file() or signature.is_symlink():
        raise BankError(f"{folder}: not signed (no {SIGNATURE_FILE}), and --require-signature asks for it: amlora sign")
    from cryptography.exceptions import InvalidSignature

    try:
        verifier = library.verifying.Config().use_elliptic_key_verifier(public_key=key)
        verifier.set_hashing_config(_hashing(library)).verify(folder, signature)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, InvalidSignature) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BankError(
            f"{folder}: its signature does not hold under {key} ({reason}): not by this key, or changed since"
        ) from error


def _hashing(library: Any) -> Any:
    return library.hashing.Config().set_ignored_paths(paths=_IGNORED, ignore_git_paths=True).set_allow_symlinks(False)


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
    try:
        text = key.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: cannot read {key} ({error}); expected a PEM file") from error
    kind = "PUBLIC" if public else "PRIVATE"
    if not re.search(rf"-----BEGIN [A-Z ]*{kind} KEY-----", text):
        raise UserError(f"{option}: found {key}, expected the PEM of a {kind.lower()} key")
