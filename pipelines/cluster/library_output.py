"""What libraries may say, in the driver and in its workers: warnings and errors, the rest only on request."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, TextIO

from amlora_dist.packaged_model import NOTE

if TYPE_CHECKING:
    StreamHandler = logging.StreamHandler[TextIO]
else:
    StreamHandler = logging.StreamHandler  # takes no type at run time before Python 3.11

_QUIET = {
    "DEEPSPEED_LOG_LEVEL": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "PYTHONWARNINGS": "ignore",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_PROMPT_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Settings of the libraries below us, for this process and its workers; what the user has set stays."""

_CHATTY = ("alembic", "datasets", "deepspeed", "DeepSpeed", "filelock", "huggingface_hub", "mlflow", "ray", "torch")


class _ToStandardError(StreamHandler):
    """Writes to whatever ``sys.stderr`` is at the moment: a progress bar replaces it to print above itself."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def set_up(*, verbose: bool) -> None:
    """Logging of this process: warnings of the project, and with ``verbose`` everything the libraries say."""
    logging.addLevelName(NOTE, "note")
    handler = _ToStandardError()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s" if verbose else "%(levelname)s: %(message)s"))
    # Threads that spin while they wait for each other collapse where others want the CPUs. Changes no result.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(handlers=[handler], level=logging.INFO if verbose else NOTE, force=True)
    if verbose:
        return
    quieten()
    warnings.simplefilter("ignore")


def quieten() -> None:
    """Turn off the bars and remarks of the libraries below us, and leave the logging and warnings of this process's own
    program as they are; before the libraries are imported, since they look once."""
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, in a notebook without widgets


def quiet_libraries() -> None:
    """Leave warnings and errors of the libraries; their chatter hides them."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("DeepSpeed", "deepspeed", "ray", "urllib3", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
