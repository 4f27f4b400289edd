"""Banks on the Hugging Face Hub, through its own client.

The client's cache, sign-in, `HF_HUB_OFFLINE` and `HF_ENDPOINT` hold here as elsewhere: what was
downloaded once loads without a network. What the client raises becomes a BankError that says
what to do. A bank is read as strictly as from a folder.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from adapters.bank import FILES, Bank
from adapters.card import model_card
from tocom import BankError

SCHEME: Final = "hf://"
_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_REFERENCE = re.compile(rf"{SCHEME}([^/@]+/[^/@]+)(?:@(.+))?")
_SIGN_IN = "sign in (`hf auth login`, or HF_TOKEN)"


def parse(reference: str) -> tuple[str, str | None]:
    """Return the hub id and the revision of `hf://ORG/NAME` or `hf://ORG/NAME@REVISION`.

    Raises:
        BankError: if the reference has another form.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise BankError(f"a hub reference is {SCHEME}ORG/NAME[@REVISION], got {reference!r}")
    return match[1], match[2]


def pull_bank(
    repo_id: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Bank:
    """Read a bank from the hub's cache, downloaded if need be.

    Both files are of one commit, and no other file of the repository is downloaded.

    Args:
        repo_id: `ORG/NAME`.
        revision: branch, tag or commit; by default the default branch.
        cache_dir, local_files_only, token: as for `huggingface_hub.snapshot_download`.

    Raises:
        BankError: if there is no such bank, it cannot be had from here, or it is faulty.
    """
    _check_id(repo_id)
    with _explained(repo_id, revision):
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=list(FILES),
            )
        )
    for name in FILES:
        if not (folder / name).is_file():
            raise BankError(f"{_at(repo_id, revision)} on the hub is no bank: it has no {name}")
    return Bank.load(folder)


def push_bank(
    bank: Bank,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    plots: Sequence[str | Path] = (),
    license: str | None = None,  # noqa: A002 (the hub's word)
) -> str:
    """Upload a bank, with a generated model card.

    Args:
        bank: the bank.
        repo_id: `ORG/NAME`; it is made if it is not there. Its `README.md` is replaced.
        private: whether it must be private; by default what the organisation has chosen.
        revision: branch, made if it is not there; by default the default branch.
        commit_message: by default the bank's name and digest.
        token: by default who is signed in.
        create_pr: open a pull request instead of a commit; then without `revision`.
        plots: picture files to add to the repository and to show on the card.
        license: the hub's identifier of the bank's licence; none is claimed unless given.

    Returns:
        The URL of the commit.

    Raises:
        BankError: if it cannot be uploaded; nothing is half-committed.
    """
    _check_id(repo_id)
    api = HfApi(token=token)
    with TemporaryDirectory() as temporary:
        folder = bank.save(Path(temporary) / bank.info.name)
        names = [Path(plot).name for plot in plots]
        card = model_card(bank, repo_id, license=license, plots=names)
        (folder / "README.md").write_text(str(card), encoding="utf-8")
        for plot in plots:
            _add(Path(plot), folder)
        with _explained(repo_id, revision):
            _prepare(api, repo_id, private, None if create_pr else revision)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message or f"Bank {bank.info.name}@{bank.info.digest[:12]}",
                create_pr=create_pr,
            )
    return commit.commit_url


def _check_id(repo_id: str) -> None:
    if not _ID.fullmatch(repo_id):
        raise BankError(f"a hub id is ORG/NAME, got {repo_id!r}")


def _add(plot: Path, folder: Path) -> None:
    if not plot.is_file():
        raise BankError(f"there is no plot {plot}")
    if (folder / plot.name).exists():
        raise BankError(f"{plot} cannot be added: the bank has a file {plot.name} already")
    shutil.copyfile(plot, folder / plot.name)


def _prepare(api: HfApi, repo_id: str, private: bool | None, branch: str | None) -> None:
    """Make the repository and the branch, if they are not there."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    # The hub leaves an existing repository as public as it was, without a word.
    if private and not api.model_info(repo_id).private:
        raise BankError(f"{repo_id} is on the hub already and public: make it private there first")
    # References such as refs/pr/1 are there already; the hub lets nobody make them.
    if branch is not None and not branch.startswith("refs/"):
        api.create_branch(repo_id, branch=branch, exist_ok=True)


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except BankError:
        raise
    except Exception as error:  # the client raises whatever its transport raises
        raise BankError(_explanation(error, repo_id, revision)) from error


def _explanation(error: Exception, repo_id: str, revision: str | None) -> str:
    said = _line(error)
    match error:
        case HFValidationError():
            return f"{repo_id!r} is no hub id: {said}"
        case GatedRepoError():
            return f"{repo_id} is gated: ask for access on its page on the hub, then {_SIGN_IN}"
        case RepositoryNotFoundError():
            return f"the hub has no repository {repo_id}, or a private one: check it, or {_SIGN_IN}"
        case RevisionNotFoundError():
            return f"{repo_id} has no revision {revision!r}: name a branch, a tag or a commit"
        case LocalEntryNotFoundError():
            cause = error.__cause__
            why = f"{type(cause).__name__}: {_line(cause)}" if cause else "local_files_only"
            return (
                f"{_at(repo_id, revision)} is not in the hub's cache, and the hub was not reached "
                f"({why}): load it once with a network, then the cache serves"
            )
        case HfHubHTTPError() if error.response is not None:
            hint = f"; {_SIGN_IN} with the right to do this"
            return f"{repo_id}: {said}{hint if error.response.status_code in (401, 403) else ''}"
        case _:
            return f"{repo_id}: the hub's client failed ({type(error).__name__}: {said})"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _at(repo_id: str, revision: str | None) -> str:
    return repo_id if revision is None else f"{repo_id}@{revision}"
