"""A bank that works, loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.serving.bank import ServedBank
from tests.bank_with_base import write_working_bank
from tests.serving.servers import Running, running


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Banks by architecture, next to their base models; only read."""
    folder = tmp_path_factory.mktemp("served")
    for kind in ("llama", "t5"):
        write_working_bank(folder / kind, folder / f"base-{kind}", kind)
    return folder


@pytest.fixture(scope="session")
def model(place: Path) -> AMLoRAModel:
    """The causal one."""
    return AMLoRAModel.from_bank(place / "llama", device="cpu")


@pytest.fixture(scope="session")
def server(model: AMLoRAModel) -> Iterator[Running]:
    """It, served with the default limits."""
    with running(ServedBank(model, "words")) as one:
        yield one
