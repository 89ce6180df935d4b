"""Which version of a registered model is its newest, and whose the alias ``current`` is.

MLflow's numbers say when a version was registered, not how far the run had come: a stage that is published again, because
its version was deleted or its rows changed, gets the highest number although its bank has the fewest tasks. Newest is
therefore the run's last stage; of two versions of one stage the later one, or the one that the run has taken up again since
(``take_up``: rows had changed, and came back).

``current`` goes that way only forwards. This project notes on the registered model where it left the alias
(``tags.POINTED``); an alias that points somewhere else was set by a person, and is left alone until they delete it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from amlora_dist.registry import tags
from amlora_dist.registry.connection import is_code

if TYPE_CHECKING:
    from amlora_dist.registry.connection import Connection
    from amlora_dist.registry.store import Store
    from amlora_dist.registry.versions import Version

log = logging.getLogger(__name__)


def newest(versions: Sequence[Version]) -> Version | None:
    """Of the highest stage the version with the highest number, unless another was taken up since; None if none is."""
    return max(versions, key=_order(versions), default=None)


def take_up(store: Store, version: Version, epoch: int, guard: Callable[[], None]) -> None:
    """Have a version count as the newest of its stage again: its run goes on from it, in this epoch, not from later ones.

    Args:
        store: which has it.
        version: that the run takes up.
        epoch: of the run's lease.
        guard: called right before each write.
    """
    of_stage = [one for one in store.counted_versions(version.registered_model) if one.stage == version.stage]
    last = newest(of_stage)
    if last is not None and last.number != version.number:
        store.tag_version(version, {tags.TAKEN: str(epoch)}, guard)
        store.ensure_current(version.registered_model, guard)


def ensure_current(
    connection: Connection,
    registered_model: str,
    good: Sequence[Version],
    guard: Callable[[], None],
    *,
    backwards: bool = False,
) -> None:
    """Point the alias ``current`` at the newest version, unless it would go back or a person has set it elsewhere.

    Args:
        connection: of the store.
        registered_model: whose alias.
        good: its versions that count.
        guard: called right before each write.
        backwards: the newest was deleted on purpose, so that an earlier one may follow it.
    """
    wanted = newest(good)
    model = _read_model(connection, registered_model)
    if wanted is None or model is None:
        return
    number = model.aliases.get(tags.CURRENT)
    there = {version.number: version for version in good}.get(int(number)) if number is not None else None
    noted, stage = _noted(model.tags.get(tags.POINTED, ""))
    if number is not None and noted and int(number) not in noted:
        if wanted.number != int(number):
            log.warning(
                "models:/%s@%s was pointed at version %s by somebody and stays there (the newest is version %d); delete the"
                " alias to have it follow the run again",
                registered_model, tags.CURRENT, number, wanted.number,
            )  # fmt: skip
        return
    order = _order(good)
    if not backwards and order(wanted) < (order(there) if there else (stage, 0, 0)):
        return
    if there is not None and there.number == wanted.number and noted == [wanted.number]:
        return
    client = connection.client

    def note(text: str) -> None:
        guard()
        connection.call(
            "tag a registered model", client.set_registered_model_tag, registered_model, tags.POINTED, text
        )

    if there is None or there.number != wanted.number:
        # Both, until it has moved: who dies in between has set neither by hand.
        note(_text([*([] if number is None else [int(number)]), wanted.number], max(stage, wanted.stage)))
        guard()
        connection.call(
            "move an alias", client.set_registered_model_alias, registered_model, tags.CURRENT, str(wanted.number)
        )
    note(_text([wanted.number], wanted.stage))


def _order(versions: Sequence[Version]) -> Callable[[Version], tuple[int, int, int]]:
    """How new each of some versions is. Epochs count only where one was taken up: who deletes a lease begins them again."""
    again = any(tags.TAKEN in version.tags for version in versions)
    return lambda version: (version.stage, version.taken if again else 0, version.number)


def _text(numbers: list[int], stage: int) -> str:
    return f"{','.join(map(str, numbers))} stage {stage}"


def _noted(text: str) -> tuple[list[int], int]:
    """The numbers at which this project has left the alias, and the stage of the last; none of a model of older code."""
    numbers, _, stage = text.partition(" stage ")
    found = [int(number) for number in numbers.split(",") if number.isdecimal()]
    return found, int(stage) if stage.isdecimal() else 0


def _read_model(connection: Connection, registered_model: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return connection.call(
            "read a registered model", connection.client.get_registered_model, registered_model
        )
    except MlflowException as error:
        if is_code(error, "RESOURCE_DOES_NOT_EXIST"):
            return None
        raise
