"""MLflow's way in: ``mlflow.pyfunc.load_model("models:/NAME@ALIAS").predict(frame)``.

MLflow downloads the version's own folder and calls ``_load_pyfunc`` with it; the adapters it refers to are then
fetched from where the manifest says, and checked by digest. The tracking server is the one MLflow is set to.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.errors import BankError, UserError
from amlora_dist.registry import transfer
from amlora_dist.registry.connection import connect
from amlora_dist.registry.manifest import Stored, read_manifest
from amlora_dist.registry.runs import Runs

if TYPE_CHECKING:
    from amlora_dist.model import AMLoRAModel

log = logging.getLogger(__name__)


class BankModel:
    """What MLflow wraps: ``predict`` on a data frame with a column ``text``."""

    def __init__(self, model: AMLoRAModel) -> None:
        self.model = model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """One answer for each row.

        Args:
            model_input: a pandas.DataFrame with a column ``text``, and optionally ``question`` (``questions`` of
                ``AMLoRAModel.predict``).
            params: further keyword arguments of ``AMLoRAModel.predict``.

        Raises:
            UserError: there is no column ``text``.
        """
        if "text" not in getattr(model_input, "columns", ()):
            found = list(getattr(model_input, "columns", [])) or type(model_input).__name__
            raise UserError(f"predict: found columns {found}, expected a pandas.DataFrame with a column 'text'")
        texts = [str(text) for text in model_input["text"]]
        options = dict(params or {})
        if "question" in model_input.columns:
            options["questions"] = [str(question) for question in model_input["question"]]
        return list(self.model.predict(texts, **options))


def complete(folder: Path, dest: Path) -> Path:
    """Make ``dest`` the whole bank of a version's folder as MLflow downloads it; see ``Store.pull``.

    ``folder`` is only read: in a serving container it may be read-only.
    """
    manifest = read_manifest(folder)
    store: Runs | None = None

    def fetch(path: str, stored: Stored | None, target: Path) -> None:
        nonlocal store
        target.parent.mkdir(parents=True, exist_ok=True)
        if (folder / path).is_file():
            shutil.copyfile(folder / path, target)
            return
        if stored is None:
            raise BankError(f"{folder / path}: missing, and the manifest does not say where it is stored")
        store = store or _tracking_store(dest.parent)
        transfer.fetch_file(store, path, stored, target)

    part = dest.with_name(f".{dest.name}.part")
    return transfer.assemble(manifest, part, dest, fetch, statistics=False)


def _tracking_store(home: Path) -> Runs:
    """The store that MLflow itself is set to."""
    import mlflow

    return Runs(connect(home, mlflow.get_tracking_uri()))


def _load_pyfunc(path: str) -> BankModel:
    """Called by MLflow with the local folder of a version."""
    from amlora_dist.model import AMLoRAModel

    folder = Path(path)
    with tempfile.TemporaryDirectory(prefix="amlora-bank-") as aside:
        whole = complete(folder, Path(aside) / "bank")
        return BankModel(AMLoRAModel.from_bank(whole))
