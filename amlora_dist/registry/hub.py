"""Banks on the Hugging Face Hub: a repository holds one bank's folder, file by file as the manifest lists it.

Everything goes through ``huggingface_hub``, with its own settings (``HF_TOKEN``, ``HF_ENDPOINT``, the login that it keeps).
The base model is never sent: only what ``bank_files`` names is.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from amlora_dist.digests import file_digest
from amlora_dist.errors import AmloraError, BankError, UserError, plain_reason
from amlora_dist.privacy import shown
from amlora_dist.registry import card
from amlora_dist.registry.bank_files import README_FILE, SIGNATURE_FILE, bank_files, is_allowed, refuse_unknown
from amlora_dist.registry.bank_folder import check_list, check_publishable, read_bank
from amlora_dist.registry.manifest import FILE, MAX_BYTES, Manifest, Stored, read_manifest
from amlora_dist.registry.transfer import TransferProgress, assemble, pull_place

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hf://"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class HubError(AmloraError):
    """The Hub does not answer, or does not let us; the message says who has to do what."""

    exit_code = UserError.exit_code


def parse_hub_uri(uri: str) -> tuple[str, str]:
    """Repository and revision of ``hf://OWNER/NAME[@REVISION]``; the revision's default is ``main``.

    Raises:
        UserError: it is none.
    """
    repository, _, revision = uri.removeprefix(SCHEME).partition("@")
    return check_repository(repository), revision or "main"


def check_repository(repository: str) -> str:
    """``OWNER/NAME``. Raises UserError for anything else."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is in its documentation

    try:
        validate_repo_id(repository)
        valid = _REPOSITORY.fullmatch(repository) is not None
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(f"found repository {repository!r}, expected OWNER/NAME as the Hub has it, such as my-team/helpdesk")
    return repository


def push_bank(
    folder: Path, repository: str, *, public: bool = False, base_model: str | None = None, statistics: bool = False
) -> str:
    """Make a repository hold a bank, in one commit; it is created where it does not exist.

    Args:
        folder: of the bank.
        repository: ``OWNER/NAME``.
        public: let everybody read it; default: private.
        base_model: Hub id of the base model for the card, where the bank's source is none.
        statistics: send what only further training needs, too; they go with a signature, which is over them.

    Returns:
        Address of the commit.

    Raises:
        BankError: the bank is damaged or was never trained.
        UserError: the repository holds something else, or is public and ``public`` was not given.
        HubError: the Hub does not answer, refuses the token, or the repository is somebody else's.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    check_repository(repository)
    bank = read_bank(folder)
    check_list(folder, bank.manifest, whole=True)
    check_publishable(bank.manifest, bank.adapters)
    with hub_errors(repository, "write"):
        api = _api()
        api.create_repo(repository, private=not public, exist_ok=True)
        info = api.model_info(repository)
        there = {one.rfilename for one in info.siblings or []}
        if not public and not info.private:
            raise UserError(f"{repository} is public: everybody would read the bank; say so with --public, or take another")
        if FILE not in there and (others := sorted(path for path in there if not is_allowed(path))):
            raise UserError(f"{repository} holds {others[0]!r} and no bank; take another repository")
        sent = _sent(folder, bank.manifest, statistics)
        text = card.readme(bank.manifest, base_model).encode()
        operations: list[Any] = [CommitOperationAdd(path, str(folder / path)) for path in sent]
        operations.append(CommitOperationAdd(README_FILE, text))
        stale = sorted(path for path in there - set(sent) if path == SIGNATURE_FILE or not is_allowed(path))
        operations += [CommitOperationDelete(path) for path in stale]
        done = api.create_commit(
            repository, operations, commit_message=f"Bank of {len(bank.adapters)} adapters, run {bank.manifest.run_id}",
            parent_commit=info.sha,
        )  # fmt: skip
    return str(done.commit_url)


def pull_from_hub(
    uri: str,
    dest: Path,
    *,
    progress: TransferProgress | None = None,
    statistics: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Make ``dest`` the bank of a repository, each file compared with the manifest's list; as ``Store.pull``.

    Args:
        uri: ``hf://OWNER/NAME[@REVISION]``.
        dest: must not exist, or be empty.
        progress: called with (parts done, parts in all, name).
        statistics: fetch what only the continuation of the bank needs, too.
        check: called with the whole folder before it becomes ``dest``.

    Raises:
        UserError: ``dest`` is there already, or the repository holds no bank.
        BankError: what it holds is damaged, or more than a bank.
        HubError: the Hub does not answer, or does not show it to this token.
    """
    repository, revision = parse_hub_uri(uri)
    dest = pull_place(dest)
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"{dest}: is there already; give a new folder, or remove it first")
    with hub_errors(repository, "read"):
        info = _api().model_info(repository, revision=revision)
        commit = str(info.sha)  # one commit throughout, whoever pushes meanwhile
        paths = [one.rfilename for one in info.siblings or []]
        if FILE not in paths:
            raise UserError(f"{uri}: holds no {FILE}, expected a bank; push one with: amlora push BANK {repository}")
        with tempfile.TemporaryDirectory(prefix=".manifest.", dir=dest.parent) as tmp:
            manifest = read_manifest(_fetched(repository, commit, FILE, Path(tmp), most=MAX_BYTES).parent)
        refuse_unknown(paths, manifest, uri)

        def fetch(path: str, stored: Stored | None, target: Path) -> None:
            entry = (manifest.files or {}).get(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".fetch.", dir=target.parent) as tmp:
                size = None if entry is None else entry.size
                file = _fetched(repository, commit, path, Path(tmp), exactly=size)
                if entry is not None and (found := file_digest(file)) != entry.sha256:
                    raise BankError(f"{uri}/{path}: sha256: found {found}, the manifest has {entry.sha256}: it was changed")
                file.replace(target)

        def checked(folder: Path) -> None:
            if SIGNATURE_FILE in paths:
                fetch(SIGNATURE_FILE, None, folder / SIGNATURE_FILE)
            if check is not None:
                check(folder)

        part = dest.with_name(f".{dest.name}.part")
        wanted = statistics and all(entry.file in paths for entry in manifest.statistics)
        if statistics and not wanted:
            raise UserError(f"{uri}: was pushed without statistics; push it again with --statistics, or pull without")
        return assemble(manifest, part, dest, fetch, statistics=wanted, progress=progress, check=checked)


@contextlib.contextmanager
def hub_errors(repository: str, doing: str) -> Iterator[None]:
    """One line for what the Hub answers.

    Args:
        repository: that is asked for.
        doing: ``read`` or ``write``.

    Raises:
        HubError: says who has to do what.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    # Of the HTTP library that this version of the client has: httpx, or httpx2.
    transport = cast("type[Exception]", HfHubHTTPError.__bases__[0])

    try:
        yield
    except OfflineModeIsEnabled:
        raise HubError("the Hub is switched off by HF_HUB_OFFLINE; unset it") from None
    except RevisionNotFoundError:
        raise HubError(f"{repository}: no such revision; name a branch, a tag or a commit of it") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401 and not isinstance(error, RepositoryNotFoundError):
            raise HubError(f"the Hub does not take this token for {repository}: it is wrong or missing; {_LOGIN}") from None
        if status == 403:
            raise HubError(
                f"{repository} is somebody else's, or the token may not {doing} it; take OWNER/NAME of your own, or a token"
                f" that may {doing}"
            ) from None
        if isinstance(error, RepositoryNotFoundError):
            raise HubError(f"{repository}: not on the Hub, or not for this token; mind the spelling, or {_LOGIN}") from None
        if status == 412:
            raise HubError(f"{repository} was changed by somebody meanwhile; run the command again") from None
        raise HubError(f"the Hub answered {status} for {repository}: {_first_line(error)}") from None
    except (transport, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:  # a file of ours, not the network
            raise
        reason = plain_reason(error).partition("\n")[0]
        where = shown(constants.ENDPOINT)
        raise HubError(f"the Hub at {where} does not answer ({reason}); try again later, or mind HF_ENDPOINT") from None


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="amlora-dist")


def _sent(folder: Path, manifest: Manifest, statistics: bool) -> list[str]:
    """Paths of what is pushed, but for the card."""
    signed = (folder / SIGNATURE_FILE).is_file()
    included = [file for file in bank_files(manifest) if statistics or signed or file.kind != "statistics"]
    own = [FILE, *(file.path for file in included), *([SIGNATURE_FILE] if signed else [])]
    if missing := [path for path in own if not (folder / path).is_file() and not path.startswith("statistics/")]:
        raise BankError(f"{folder / missing[0]}: missing; fetch the bank again")
    absent = [path for path in own if not (folder / path).is_file()]
    if absent and (statistics or signed):
        raise UserError(f"{folder / absent[0]}: not there; pull the bank with --statistics first")
    return own


def _fetched(
    repository: str, commit: str, path: str, folder: Path, *, most: int | None = None, exactly: int | None = None
) -> Path:
    """One file of a repository, in ``folder``; its size is asked first."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    size = get_hf_file_metadata(hf_hub_url(repository, path, revision=commit)).size or 0
    if (most is not None and size > most) or (exactly is not None and size != exactly):
        expected = f"at most {most}" if exactly is None else f"{exactly}"
        raise BankError(f"{repository}/{path}: found {size} bytes on the Hub, expected {expected}: it was changed")
    return Path(hf_hub_download(repository, path, revision=commit, local_dir=folder))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
