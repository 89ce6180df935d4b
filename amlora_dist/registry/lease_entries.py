"""Lease entries in MLflow: empty registered models, whose names the registry lets exist once (see ``claims``)."""

from __future__ import annotations

from collections.abc import Mapping

from amlora_dist.registry.connection import Connection, is_code

_DESCRIPTION = (
    "Not a model: it says who may write for a run or a stage (docs/operations.md). Leave it alone: `amlora` looks after it,"
    " and no command lists it."
)


class LeaseEntries:
    """``claims.Entries`` on MLflow's registry."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._client, self._call = connection.client, connection.call

    def create_entry(self, name: str, values: Mapping[str, str]) -> bool:
        """Create a lease entry (an empty registered model) with its tags; False when the name is taken."""
        from mlflow.exceptions import MlflowException

        try:
            self._call("claim", self._client.create_registered_model, name, tags=dict(values), description=_DESCRIPTION)
        except MlflowException as error:
            if is_code(error, "RESOURCE_ALREADY_EXISTS"):
                return False
            raise
        return True

    def entries(self, prefix: str) -> dict[str, dict[str, str]]:
        """Tags of the lease entries whose name starts with ``prefix``."""
        # in LIKE a "_" matches any sign, so the answer may hold more
        found = self._connection.pages(self._client.search_registered_models, f"name LIKE '{prefix}%'")
        return {model.name: dict(model.tags) for model in found if model.name.startswith(prefix)}

    def tag_entry(self, name: str, key: str, value: str) -> bool:
        """Set a tag of a lease entry; False when it is gone."""
        from mlflow.exceptions import MlflowException

        try:
            self._call("write a heartbeat", self._client.set_registered_model_tag, name, key, value)
        except MlflowException as error:
            if is_code(error, "RESOURCE_DOES_NOT_EXIST"):
                return False
            raise
        return True

    def delete_entry(self, name: str) -> None:
        """Delete a lease entry, if it is there."""
        from mlflow.exceptions import MlflowException

        try:
            self._call("delete an old claim", self._client.delete_registered_model, name)
        except MlflowException as error:
            if not is_code(error, "RESOURCE_DOES_NOT_EXIST"):
                raise
