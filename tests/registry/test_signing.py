"""A bank that must be signed is refused unless it is, whole and by that key, wherever it comes in."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

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
    trust.check(bank)
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


def test_a_signed_version_is_pulled_promoted_and_loaded_and_an_unsigned_one_is_not(
    keys: Path, tmp_path: Path, amlora_home: Path, empty_home: Path
) -> None:
    shutil.copytree(empty_home, amlora_home)
    (tmp_path / "work").mkdir()
    store = Store.open(amlora_home)
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
