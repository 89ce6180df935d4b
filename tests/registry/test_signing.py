"""A bank that must be signed is refused unless it is, whole and by that key, wherever it comes in."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amlora_dist.errors import BankError, UserError
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry import signing
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.signing import Trust, sign
from amlora_dist.registry.store import Store
from pipelines.cli.bank_output import point, pull_to, sign_bank
from tests.registry.tiny_banks import TASKS, publish_sequence, rewrite, tiny_bank

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs of keys: ``ours`` and ``theirs``, ``.key`` and ``.pub``."""
    pytest.importorskip("model_signing", reason="the extra `sign` is not installed")
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.key").write_bytes(private)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    tiny_bank(tmp_path / "bank")
    return tmp_path / "bank"


def test_a_signed_bank_holds_and_any_change_of_any_part_does_not(bank: Path, keys: Path, tmp_path: Path) -> None:
    trust = Trust.of(keys / "ours.pub")
    with pytest.raises(BankError, match=r"not signed \(no model\.sig\)"):
        trust.check(bank)
    sign(bank, keys / "ours.key")
    trust.check(bank)
    read_bank(bank)
    (bank / "README.md").write_text("# Our bank")
    (bank / ".gitattributes").write_text("x")
    (bank / "adapters" / ".DS_Store").write_text("x")
    trust.check(bank)
    (tmp_path / "link").symlink_to(bank)
    trust.check(tmp_path / "link")
    with pytest.raises(BankError, match="does not hold under"):
        Trust.of(keys / "theirs.pub").check(bank)
    for name in ("manifest.json", "MLmodel", "router.safetensors", "adapters/2-agnews/recipe.safetensors", "statistics/3-yahoo.safetensors"):  # fmt: skip  # noqa: E501
        kept = (bank / name).read_bytes()
        (bank / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(BankError, match="does not hold under"):
            trust.check(bank)
        (bank / name).unlink()
        with pytest.raises(BankError, match="does not hold under"):
            trust.check(bank)
        (bank / name).write_bytes(kept)
    (bank / "code.py").write_text("x")
    with pytest.raises(BankError, match="does not hold under"):
        trust.check(bank)
    (bank / "code.py").unlink()
    (bank / "model.sig").write_text("{}")
    with pytest.raises(BankError, match="does not hold under"):
        trust.check(bank)
    with pytest.raises(BankError):
        AMLoRAModel.from_bank(bank, require_signature=keys / "ours.pub")


def test_a_bank_that_was_made_again_with_right_digests_is_not_signed_for_it(bank: Path, keys: Path) -> None:
    """What digests alone cannot tell: everything is consistent, and somebody else's."""
    sign(bank, keys / "ours.key")
    signature = (bank / "model.sig").read_bytes()
    rewrite(bank, bank_template="{{ text }}\nEvil:")
    (bank / "model.sig").write_bytes(signature)
    read_bank(bank)
    with pytest.raises(BankError, match="does not hold under"):
        Trust.of(keys / "ours.pub").check(bank)


@pytest.fixture
def store(tmp_path: Path, amlora_home: Path, empty_home: Path) -> Store:
    """An empty one, and ``work`` to make banks in."""
    shutil.copytree(empty_home, amlora_home)
    (tmp_path / "work").mkdir()
    return Store.open(amlora_home)


def test_a_signed_version_is_pulled_promoted_and_loaded_and_an_unsigned_one_is_not(
    keys: Path, tmp_path: Path, store: Store
) -> None:
    publish_sequence(store, "banks", tmp_path / "work", tasks=TASKS[:2])
    trust = Trust.of(keys / "ours.pub")
    with pytest.raises(BankError, match="not signed"):
        pull_to("models:/banks/2", tmp_path / "no", None, statistics=False, trust=trust)
    assert not (tmp_path / "no").exists()
    with pytest.raises(BankError, match="not signed"):
        point("banks", 2, "champion", None, trust)
    with pytest.raises(UserError, match="no alias 'champion'"):
        store.resolve("models:/banks@champion")
    with pytest.raises(BankError, match="not signed"):
        AMLoRAModel.from_bank("models:/banks/2", require_signature=keys / "ours.pub")

    assert "is signed" in sign_bank("models:/banks/2", keys / "ours.key", None)
    pull_to("models:/banks/2", tmp_path / "yes", None, statistics=False, trust=trust)
    trust.check(tmp_path / "yes")
    shutil.copytree(tmp_path / "yes", tmp_path / "elsewhere")
    trust.check(tmp_path / "elsewhere")
    assert "version 2" in point("banks", 2, "champion", None, trust) or store.resolve("models:/banks@champion").number == 2
    with pytest.raises(BankError, match="does not hold under"):
        pull_to("models:/banks/2", tmp_path / "no", None, statistics=True, trust=Trust.of(keys / "theirs.pub"))
    with pytest.raises(BankError, match="not signed"):
        point("banks", 1, "champion", None, trust)
    assert store.resolve("models:/banks@champion").number == 2, "it did not move"


def test_a_key_that_cannot_sign_leaves_the_signature_that_is_there(bank: Path, keys: Path, tmp_path: Path) -> None:
    """Locked with a password, of another kind or curve, cut, a pipe: told before anything of the bank is touched."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

    sign(bank, keys / "ours.key")
    kept = (bank / "model.sig").read_bytes()
    made: dict[str, tuple[Any, Any, str]] = {
        "locked": (ec.generate_private_key(ec.SECP256R1()), BestAvailableEncryption(b"x"), "locked with a password"),
        "rsa": (rsa.generate_private_key(65537, 2048), NoEncryption(), "one of another kind, expected an elliptic curve's"),
        "ed25519": (ed25519.Ed25519PrivateKey.generate(), NoEncryption(), "one of another kind"),
        "k1": (ec.generate_private_key(ec.SECP256K1()), NoEncryption(), "one of curve secp256k1, expected .*secp256r1"),
    }
    for name, (key, locked, message) in made.items():
        (tmp_path / name).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))
        with pytest.raises(UserError, match=rf"--key: found .*{name}, .*{message}"):
            sign(bank, tmp_path / name)
    (tmp_path / "cut").write_bytes((keys / "ours.key").read_bytes()[:60] + b"\n-----END PRIVATE KEY-----\n")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("cut", "expected the PEM of a private key"), ("pipe", "which is no file"), ("no", "cannot read")):
        with pytest.raises(UserError, match=message):
            sign(bank, tmp_path / name)
    assert (bank / "model.sig").read_bytes() == kept
    assert not [path for path in bank.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["rsa", "secp256k1"])
def test_a_public_key_that_cannot_have_signed_is_told_before_anything_is_fetched(kind: str, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pytest.importorskip("model_signing", reason="the extra `sign` is not installed")
    key: Any = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP256K1())
    (tmp_path / "key").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(UserError, match=r"--require-signature: found .*, expected an elliptic curve's public key: secp"):
        Trust.of(tmp_path / "key")


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one["dsseEnvelope"].update(signatures=[]),
        lambda one: one["dsseEnvelope"]["signatures"][0].update(sig="!"),
        lambda one: one["dsseEnvelope"].update(payload=base64.b64encode(b"[]").decode()),
        lambda one: one["dsseEnvelope"].update(payloadType="text"),
        lambda one: one.update(verificationMaterial=None),
        lambda one: one.update(dsseEnvelope=None),
        lambda one: one.clear(),
        b"", b"\xff", b"[]", b"7", b"null", b"[" * 100_000, b" " * (1 << 20) + b"{", "cut",
    ],
)  # fmt: skip
def test_no_signature_of_any_shape_is_more_than_refused(
    change: Callable[[Any], None] | bytes | str, bank: Path, keys: Path
) -> None:
    file = sign(bank, keys / "ours.key")
    if callable(change):
        value = json.loads(file.read_bytes())
        change(value)
        file.write_text(json.dumps(value), encoding="utf-8")
    else:
        file.write_bytes(file.read_bytes()[:200] if isinstance(change, str) else change)
    with pytest.raises(BankError, match="does not hold under"):
        Trust.of(keys / "ours.pub").check(bank)


def test_what_was_checked_is_what_is_read(bank: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who writes between the check and the reading gets nothing loaded."""
    sign(bank, keys / "ours.key")
    other = tmp_path / "other"
    shutil.copytree(bank, other)
    rewrite(other, bank_template="{{ text }}\nEvil:")
    read = signing.read_bank

    def late(folder: Path, **options: Any) -> Any:
        shutil.rmtree(bank)
        shutil.copytree(other, bank)
        return read(folder, **options)

    digest = read_bank(bank).manifest.digest()
    for trust in (Trust.of(keys / "ours.pub"), Trust.of(expect_digest=digest)):
        shutil.copytree(bank, tmp_path / "kept")
        trust.read(bank)
        monkeypatch.setattr(signing, "read_bank", late)
        with pytest.raises(BankError, match="was changed by somebody while it was read"):
            trust.read(bank)
        monkeypatch.setattr(signing, "read_bank", read)
        shutil.rmtree(bank)
        (tmp_path / "kept").rename(bank)


def test_a_signed_bank_without_its_statistics_says_how_to_get_them(bank: Path, keys: Path) -> None:
    sign(bank, keys / "ours.key")
    shutil.rmtree(bank / "statistics")
    read_bank(bank)
    with pytest.raises(BankError, match="lacks statistics, which are signed too: pull the bank with --statistics"):
        Trust.of(keys / "ours.pub").check(bank)


def test_a_bank_whose_files_were_written_anew_is_not_signed(bank: Path, keys: Path) -> None:
    """The tensors are the same, the file is not the one that the manifest lists: nobody could pull what would be signed."""
    from safetensors.torch import load_file, save_file

    file = bank / "adapters" / "2-agnews" / "recipe.safetensors"
    save_file(load_file(file), file, metadata={"format": "qt"})
    read_bank(bank)
    with pytest.raises(BankError, match=r"recipe\.safetensors"):
        sign_bank(str(bank), keys / "ours.key", None)
    assert not (bank / "model.sig").exists()


def test_a_signature_in_the_store_that_does_not_hold_changes_no_copy_that_is_here(
    keys: Path, tmp_path: Path, store: Store
) -> None:
    publish_sequence(store, "banks", tmp_path / "work", tasks=TASKS[:1])
    sign_bank("models:/banks/1", keys / "ours.key", None)
    pull_to("models:/banks/1", tmp_path / "here", None, statistics=True)
    kept = (tmp_path / "here" / "model.sig").read_bytes()
    sign_bank("models:/banks/1", keys / "theirs.key", None)
    with pytest.raises(BankError, match="does not hold under"):
        pull_to("models:/banks/1", tmp_path / "here", None, statistics=True, trust=Trust.of(keys / "ours.pub"))
    assert (tmp_path / "here" / "model.sig").read_bytes() == kept
    pull_to("models:/banks/1", tmp_path / "here", None, statistics=True, trust=Trust.of(keys / "theirs.pub"))


def test_without_a_signature_a_digest_can_be_demanded(bank: Path) -> None:
    digest = read_bank(bank).manifest.digest()
    Trust.of(expect_digest=digest).check(bank)
    with pytest.raises(BankError, match=r"digest: found .*, expected 0000"):
        AMLoRAModel.from_bank(bank, expect_digest="0" * 64)
    with pytest.raises(UserError, match="expected the 64 hexadecimal digits"):
        Trust.of(expect_digest=digest[:12])


def test_keys_and_the_library_are_looked_at_before_anything_is_fetched(
    keys: Path, bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--require-signature: cannot read"):
        Trust.of(tmp_path / "nothing.pub")
    with pytest.raises(UserError, match="expected the PEM of a public key"):
        Trust.of(keys / "ours.key")
    with pytest.raises(UserError, match="expected the PEM of a private key"):
        sign(bank, keys / "ours.pub")
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(UserError, match=r"--require-signature needs .*: pip install 'amlora-dist\[sign\]'"):
        Trust.of(keys / "ours.pub")
    with pytest.raises(UserError, match="amlora sign needs"):
        sign(bank, keys / "ours.key")


def test_the_library_is_not_imported_by_who_demands_nothing() -> None:
    code = f"import sys, {signing.__name__}; sys.exit('model_signing' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
