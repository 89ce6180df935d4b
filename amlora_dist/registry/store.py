"""Versions of banks in MLflow: publish, find, resolve, pull. With ``runs`` and ``connection`` the one way to MLflow."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path

from amlora_dist.crash_points import reach
from amlora_dist.errors import BankError, UserError
from amlora_dist.registry import leases, newest, tags, transfer
from amlora_dist.registry.bank_folder import check_publishable
from amlora_dist.registry.bank_folder import read_version as read_version_folder
from amlora_dist.registry.connection import Connection, connect, is_code, mlflow_errors
from amlora_dist.registry.lease_entries import LeaseEntries
from amlora_dist.registry.leases import Lease, Timing, counted
from amlora_dist.registry.manifest import Manifest, Stored, read_manifest
from amlora_dist.registry.runs import Runs, check_model_name
from amlora_dist.registry.transfer import TransferProgress
from amlora_dist.registry.versions import Placement, Version, parse_uri, read_version


class Store(Runs):
    """Banks in MLflow. ``Store.open`` makes one; one process of a run holds it."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.lease_entries = LeaseEntries(connection)
        self.seen: set[Stored] = set()
        """Parts that this process has seen in the store."""

    @classmethod
    def open(cls, home: Path, tracking_uri: str | None = None, *, reads: bool = False) -> Store:
        """Open the embedded store below ``home``, or the one at ``tracking_uri``; arguments and errors as of ``connect``."""
        return cls(connect(home, tracking_uri, reads=reads))

    # ---- versions ---------------------------------------------------------------------------------------------

    def versions(self, registered_model: str) -> list[Version]:
        """All versions of a registered model, by number, stale ones included; none when it does not exist."""
        check_model_name(registered_model)
        return sorted(self._search(f"name = '{registered_model}'"), key=lambda version: version.number)

    def counted_versions(self, registered_model: str) -> list[Version]:
        """The versions that count (see ``claims``), by number."""
        return self._counted(self.versions(registered_model))

    def find_stage(self, training_fingerprint: str) -> list[Version]:
        """Versions that count, of any registered model, whose stage has this fingerprint; by name and number."""
        found = self._search(f"tags.`{tags.TRAINING_FINGERPRINT}` = '{training_fingerprint}'")
        return sorted(self._counted(found), key=lambda version: (version.registered_model, version.number))

    def find_adapter(self, adapter_fingerprint: str) -> list[Version]:
        """Those whose stage has an adapter of this fingerprint, with whatever statistics: where it was trained first."""
        found = self._search(f"tags.`{tags.ADAPTER_FINGERPRINT}` = '{adapter_fingerprint}'")
        good = sorted(self._counted(found), key=lambda version: (version.registered_model, version.number))
        return sorted(good, key=lambda version: (tags.ADAPTER_OF in version.tags, _REUSED_FROM in version.tags))

    def registered_models(self) -> list[str]:
        """Names of registered models, without the entries of leases."""
        found = self.connection.pages(self._client.search_registered_models, None)
        return sorted(model.name for model in found if not model.name.startswith(tags.LEASE_PREFIX))

    def resolve(self, uri: str) -> Version:
        """The version that ``models:/NAME@ALIAS``, ``models:/NAME/3`` or ``models:/NAME[/latest]`` means.

        Raises:
            UserError: no such model, alias or version; the message lists what there is.
            BankError: the version was written by a driver that had lost its run.
        """
        name, alias, wanted = parse_uri(uri)
        versions = self.versions(name)
        if not versions:
            known = self.registered_models()
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known) or 'none'}"
            raise UserError(f"{uri}: no registered model {name!r} with versions at {self.connection.shown}; {hint}")
        good = self._counted(versions)
        if (alias or wanted) == tags.LATEST:
            last = newest.newest(good)
            if last is None:
                raise UserError(f"{uri}: no version of {name!r} counts yet")
            return last
        number = self._alias(name, alias) if alias else int(wanted)
        if number is None:
            raise UserError(f"{uri}: {name!r} has no alias {alias!r}; set it, or take one of its {len(good)} versions")
        if found := next((version for version in good if version.number == number), None):
            return found
        if any(version.number == number for version in versions):
            raise BankError(f"{uri}: version {number} was written by a driver that had lost its run; it does not count")
        raise UserError(f"{uri}: no version {number}; there are {[version.number for version in good]}")

    def set_alias(
        self, registered_model: str, alias: str, version: Version, guard: Callable[[], None] | None = None
    ) -> None:
        """Point an alias (``champion``) at a version."""
        if guard:
            guard()
        client = self._client
        self._call("move an alias", client.set_registered_model_alias, registered_model, alias, str(version.number))

    def tag_version(self, version: Version, values: Mapping[str, str], guard: Callable[[], None] | None = None) -> None:
        """Set tags of a version, next to those it was published with."""
        if guard:
            guard()
        for key, value in values.items():
            self._call(
                "tag a version",
                self._client.set_model_version_tag,
                version.registered_model,
                str(version.number),
                key,
                value,
            )

    def ensure_current(
        self, registered_model: str, guard: Callable[[], None], *, backwards: bool = False
    ) -> None:
        """Point the alias ``current`` at the newest version that counts (``registry/newest.py``): never at fewer tasks, but
        ``backwards``, and never away from where a person has put it. A driver that resumes calls it once."""
        newest.ensure_current(
            self.connection, registered_model, self.counted_versions(registered_model), guard, backwards=backwards
        )

    # ---- publishing -------------------------------------------------------------------------------------------

    def placement(self, registered_model: str, stage_run: str, epoch: int) -> Placement:
        """Where the version of this stage and epoch keeps its parts; for the manifest, before ``publish``.

        The epoch is in the path, so that a driver that lost its run cannot write into its successor's folder.
        """
        return Placement(registered_model, stage_run, f"bank-e{epoch}")

    def publish(
        self,
        registered_model: str,
        folder: Path,
        *,
        stage_run: str,
        tags: Mapping[str, str],
        epoch: int,
        guard: Callable[[], None],
    ) -> Version:
        """Publish a bank: upload, read back, compare, register, move ``current``. Doing it twice changes nothing.

        Only the parts whose ``stored`` is ``placement(...)`` are uploaded, with the router and the frame; all
        others must be in this store already.

        Args:
            registered_model: this run's own.
            folder: ``write_version``'s; or a whole bank, whose every part is then checked.
            stage_run: MLflow run of the stage.
            tags: of the version; training fingerprint and run id are required (``registry/tags.py``).
            epoch: of the lease.
            guard: called right before each write; raises ``LeaseLostError`` (``Lease.check``).

        Raises:
            BankError: the bank is damaged, untrained, refers to what is not in the store, or reads back differently.
            UserError: the registered model belongs to another run.
        """
        root = self.placement(registered_model, stage_run, epoch).root
        manifest, adapters = read_version_folder(folder, stage_run)
        check_publishable(manifest, adapters)
        values = _version_tags(tags, manifest, epoch, root)
        found = self._same(registered_model, values)
        if found is None:
            transfer.check_placement(manifest, stage_run, root)
            transfer.check_referred(self, manifest, stage_run, self.seen)
            files = transfer.own_files(manifest, stage_run)
            guard()
            self._own(registered_model, values[_RUN_ID])
            transfer.upload(self, folder, files, stage_run, root)
            reach("artifacts_uploaded")
            transfer.read_back(self, folder, files, stage_run, root)
            self.seen.update(line.stored for line in manifest.adapters if line.stored is not None)
            reach("read_back")
            guard()
            found = self._call("register a version", self._register, registered_model, stage_run, root, values)
            reach("version_registered")
        self.ensure_current(registered_model, guard)
        reach("alias_moved")
        return found

    def reuse(
        self,
        registered_model: str,
        original: Version,
        folder: Path,
        *,
        stage_run: str,
        tags: Mapping[str, str],
        epoch: int,
        guard: Callable[[], None],
    ) -> Version:
        """Publish a version of this run that refers to another run's adapters; as ``publish``, and stores none.

        Args:
            registered_model: this run's own.
            original: the version whose training is reused (``find_stage``), or its adapter (``find_adapter``).
            folder: as in ``publish``; its manifest keeps the ``stored`` of every adapter as ``original`` has it, with
                this run's id, scores and gate settings, and with statistics of its own where these were made again.
            stage_run: MLflow run of the stage in this run.
            tags: as in ``publish``.
            epoch: as in ``publish``.
            guard: as in ``publish``.
        """
        manifest = read_manifest(folder)
        if own := [line.folder for line in manifest.adapters if line.stored is None or line.stored.run == stage_run]:
            raise BankError(f"{own[0]}: stored by this run, expected a reference to {original.uri} or an earlier stage")
        marked = {**tags, _REUSED_FROM: original.uri}
        return self.publish(registered_model, folder, stage_run=stage_run, tags=marked, epoch=epoch, guard=guard)

    def pull(self, uri: str, dest: Path, progress: TransferProgress | None = None, *, statistics: bool = True) -> Path:
        """Make a self-contained folder of a version: every adapter, checked by digest, ready for ``read_bank``.

        What an interrupted pull has fetched is kept in ``.<dest>.part`` next to ``dest``; ``dest`` appears when all
        of it is right. A ``dest`` that is this very bank is left as it is.

        Args:
            uri: as ``resolve`` takes it.
            dest: the folder to make.
            progress: called with (parts done, parts in all, name).
            statistics: fetch what only the continuation of the bank needs, too.

        Raises:
            UserError: no such version, or ``dest`` holds something else.
            BankError: something in the store is damaged, changed or missing.
        """
        return self.pull_version(self.resolve(uri), dest, progress, statistics=statistics)

    def pull_version(
        self,
        version: Version,
        dest: Path,
        progress: TransferProgress | None = None,
        *,
        statistics: bool = True,
        check: Callable[[Path], None] | None = None,
    ) -> Path:
        """``pull`` of a version already resolved; ``check`` is called with the whole folder before it becomes ``dest``."""
        if not version.artifact_path:
            raise BankError(f"{version.uri}: was not published by amlora-dist (no tag {_ARTIFACT_PATH})")
        expected = version.tags.get(_MANIFEST_DIGEST)

        def named(folder: Path) -> None:
            try:
                if check is not None:
                    check(folder)
            except BankError as error:  # a folder that is being made is nobody's
                if folder == dest.resolve():
                    raise
                raise BankError(str(error).replace(str(folder), version.uri)) from error

        return transfer.pull(
            self, version.run, version.artifact_path, expected, dest, statistics=statistics, progress=progress, check=named
        )

    # ---- leases -----------------------------------------------------------------------------------------------

    def hold_run(self, run_id: str, registered_model: str, timing: Timing | None = None) -> Lease:
        """Take the lease on a run id; the versions that count now will go on counting.

        Raises:
            HeldError: another driver holds it and lives.
        """
        return leases.acquire(
            self.lease_entries,
            leases.RUN_KEY + run_id,
            label=f"run {run_id!r}",
            count=lambda state: [version.number for version in counted(self.versions(registered_model), state)],
            timing=timing,
        )

    def claim_stage(
        self,
        training_fingerprint: str,
        *,
        label: str = "",
        deadline_s: float,
        on_wait: Callable[[], None] | None = None,
    ) -> Lease | None:
        """Claim a training fingerprint, or wait for who has it; see ``leases.claim_or_wait``."""
        return leases.claim_or_wait(
            self.lease_entries, training_fingerprint, label=label, deadline_s=deadline_s, on_wait=on_wait
        )

    def drop_claim(self, training_fingerprint: str, *, label: str) -> None:
        """Delete the claim that a dead driver of this label left on work that is published."""
        leases.drop_claim(self.lease_entries, training_fingerprint, label)

    # ---- inside -----------------------------------------------------------------------------------------------

    def _counted(self, versions: list[Version]) -> list[Version]:
        good: list[Version] = []
        for run_id in {version.run_id for version in versions}:
            state = leases.read_state(self.lease_entries, leases.RUN_KEY + run_id)
            good += counted([version for version in versions if version.run_id == run_id], state)
        return sorted(good, key=lambda version: version.number)

    def _same(self, registered_model: str, values: Mapping[str, str]) -> Version | None:
        """The version that an earlier call registered for this fingerprint and epoch."""
        check_model_name(registered_model)
        stage = f"tags.`{_TRAINING_FINGERPRINT}` = '{values[_TRAINING_FINGERPRINT]}'"
        found = self._search(f"name = '{registered_model}' and {stage}")
        return next((version for version in found if version.tags.get(_EPOCH) == values[_EPOCH]), None)

    def _register(self, registered_model: str, run: str, root: str, values: dict[str, str]) -> Version:
        """Find or create: repeated when the store was busy, so it looks first."""
        found = self._same(registered_model, values)
        if found is not None:
            return found
        made = self._client.create_model_version(
            registered_model, source=f"runs:/{run}/{root}", run_id=run, tags=values, await_creation_for=None
        )
        return read_version(made)

    def _alias(self, registered_model: str, alias: str) -> int | None:
        # search results carry no aliases, and an alias that is not there is INVALID_PARAMETER_VALUE: read the model
        try:
            model = self._call("read a registered model", self._client.get_registered_model, registered_model)
        except mlflow_errors() as error:
            if is_code(error, "RESOURCE_DOES_NOT_EXIST"):
                return None
            raise
        number = model.aliases.get(alias)
        return None if number is None else int(number)

    def _search(self, text: str) -> list[Version]:
        return [read_version(found) for found in self.connection.pages(self._client.search_model_versions, text)]


_RUN_ID, _EPOCH, _TRAINING_FINGERPRINT, _STAGE = tags.RUN_ID, tags.EPOCH, tags.TRAINING_FINGERPRINT, tags.STAGE
_ARTIFACT_PATH, _MANIFEST_DIGEST, _REUSED_FROM = tags.ARTIFACT_PATH, tags.MANIFEST_DIGEST, tags.REUSED_FROM


def _version_tags(given: Mapping[str, str], manifest: Manifest, epoch: int, root: str) -> dict[str, str]:
    if missing := [key for key in (_TRAINING_FINGERPRINT, _RUN_ID) if not given.get(key)]:
        raise BankError(f"tags: {missing} missing; a version needs its training fingerprint and run id")
    if manifest.epoch != epoch or manifest.run_id != given[_RUN_ID]:
        raise BankError(
            f"manifest: found run {manifest.run_id!r} epoch {manifest.epoch}, expected {given[_RUN_ID]!r} epoch {epoch}"
        )
    own = {_STAGE: str(manifest.stage), _EPOCH: str(epoch), _ARTIFACT_PATH: root, _MANIFEST_DIGEST: manifest.digest()}
    return {**given, **own}
