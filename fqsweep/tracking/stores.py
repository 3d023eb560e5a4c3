"""Tracking URIs, as the driver and the analysis both meet them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fqsweep.errors import InputError
from fqsweep.files import SweepPaths
from fqsweep.names import TAG_SPACE

CONNECT_S = 10
PAGE = 200  # runs with all that they have: a thousand take 100 MB
ID_LETTERS = 32
ARTIFACTS = "mlartifacts"  # beside the database of an output folder


def is_server(uri: str) -> bool:
    """Whether an MLflow server answers there, rather than a database.

    >>> is_server("http://127.0.0.1:5000"), is_server("sqlite:////data/mlflow.db")
    (True, False)
    """
    return urlsplit(uri).scheme in ("http", "https")


def without_password(text: str) -> str:
    """The text without the names and passwords of the addresses in it.

    >>> without_password("no answer from http://me:secret@host, sqlite:///a@b.db stays")
    'no answer from http://host, sqlite:///a@b.db stays'
    """
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def first_line(error: Exception | None) -> str:
    """What went wrong at a store in one line, without the passwords of addresses.

    >>> first_line(ValueError("no answer from http://me:secret@host\\nand more")), first_line(ValueError())
    ('no answer from http://host', 'ValueError')
    """
    return without_password((str(error).strip().splitlines() or [type(error).__name__])[0])


def drop_tag(client: Any, run_id: str, tag: str) -> None:
    """Take a tag from a run; one that is gone already is as it should be, because a reply may have got lost."""
    try:
        client.delete_tag(run_id, tag)
    except Exception as error:  # MLflow's own, which is not loaded here
        if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
            raise


def try_database(uri: str) -> None:
    """Connect to a database once, where it is no file: MLflow would try for two minutes before it says what is wrong.

    Raises:
        Exception: what SQLAlchemy and the driver raise; ``ModuleNotFoundError`` where the driver is not installed.
    """
    if is_server(uri) or urlsplit(uri).scheme.startswith("sqlite") or not urlsplit(uri).netloc:
        return
    from sqlalchemy import create_engine  # costs half a second that other stores do not need
    from sqlalchemy.pool import NullPool

    limits = {"connect_timeout": CONNECT_S} if urlsplit(uri).scheme.startswith("postgresql") else {}
    with create_engine(uri, poolclass=NullPool, connect_args=limits).connect():
        pass


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite database; None for other stores.

    >>> sqlite_file("sqlite:////data/mlflow.db"), sqlite_file("sqlite:///mlflow.db"), sqlite_file("http://host")
    (PosixPath('/data/mlflow.db'), PosixPath('mlflow.db'), None)
    """
    parts = urlsplit(uri)
    if not parts.scheme.startswith("sqlite"):
        return None
    return Path(parts.path.removeprefix("/"))


def default_uri(paths: SweepPaths) -> str:
    """The sweep's own database."""
    return sqlite_uri(paths.tracking_db.resolve())


def sqlite_uri(file: Path) -> str:
    """The URI of a sqlite database.

    Raises:
        InputError: its path holds what a URI means otherwise, so that another file would be opened.

    >>> sqlite_uri(Path("/data/my sweep/mlflow.db"))
    'sqlite:////data/my sweep/mlflow.db'
    """
    if wrong := re.search(r"[#?]|%[0-9a-fA-F]{2}", str(file)):
        raise InputError(
            f"a database in {str(file.parent)!r} has no address with {wrong[0]!r} in it: rename the folder"
        )
    return f"sqlite:///{file}"


def check_is_address(uri: str) -> None:
    """A tracking URI says what it is: MLflow would take a plain path for a folder of text files.

    Raises:
        InputError: it is a path.
    """
    if "://" in uri or uri.startswith("databricks"):
        return
    if Path(uri).is_dir():
        what = f"folder: give its database, sqlite:///{Path(uri) / 'mlflow.db'}"
    else:
        what = f"path: give the address of a database, sqlite:///{Path(uri)}"
    raise InputError(f"The tracking URI {uri!r} is a {what}, or of a server.")


def check_exists(uri: str) -> None:
    """A store that is only read must be there: MLflow writes a new database at an unknown path.

    Raises:
        InputError: there is no database, or the URI is a path.
    """
    database = sqlite_file(uri)
    if database is not None and not database.is_file():
        raise InputError(
            f"The tracking URI must name an existing store, but there is no database {str(database)!r}: "
            "use the URI that `fqsweep run` printed."
        )
    check_is_address(uri)


def search_runs(client: Any, filter_string: str, *, experiment_id: str | None = None) -> Iterator[Any]:
    """All runs of an ``MlflowClient`` that match, page by page, of one experiment or of all.

    A run that is removed on the way moves the pages that come after it.
    """
    experiments = [experiment_id] if experiment_id else [e.experiment_id for e in client.search_experiments()]
    token: str | None = None
    while experiments:
        page = client.search_runs(experiments, filter_string, max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def find_run(client: Any, run_id: str, *, uri: str) -> Any:
    """A run by its id, or by the first letters of it that no other run has.

    Raises:
        InputError: no run, or several, are called so.
    """
    if len(run_id) == ID_LETTERS:
        with contextlib.suppress(Exception):  # whatever the store raises for a run that is not there
            return client.get_run(run_id)
    runs = [run for run in search_runs(client, "") if run.info.run_id.startswith(run_id)]
    if len(runs) != 1:
        elsewhere = (
            "name its sweep's output folder (export --sweep-out, show --out) or its store (--tracking-uri)"
        )
        what = f"there is none: {elsewhere}" if not runs else f"{len(runs)} begin so: give more letters"
        raise InputError(f"A run called {run_id!r} must exist at {without_password(uri)!r}, but {what}.")
    return runs[0]


def fetch_artifact(client: Any, uri: str, run_id: str, name: str, folder: str) -> Path:
    """A file of a run, downloaded to ``folder`` or where it lies.

    MLflow notes the absolute place of a run's files. In an output folder that was copied or moved they lie beside the
    database, as before.
    """
    beside = _artifacts_beside(uri, run_id)
    if beside is not None and (beside / name).is_file():
        return beside / name
    return Path(client.download_artifacts(run_id, name, folder))


def fetch_space_file(client: Any, uri: str, parent_id: str, folder: str) -> Path:
    """The search space that a sweep's parent run holds, downloaded to ``folder`` or where it lies.

    Of several, which a sweep has whose file was renamed, the one that its last start tagged (``TAG_SPACE``), else the
    newest file.

    Raises:
        LookupError: the run holds none, or several of which the newest cannot be told.
    """
    beside = _artifacts_beside(uri, parent_id)
    if beside is not None:
        files = sorted(
            (path for path in beside.iterdir() if path.is_file()), key=lambda p: p.stat().st_mtime_ns
        )
        names = [path.name for path in files]
    else:
        names = [item.path for item in client.list_artifacts(parent_id)]
    spaces = [name for name in names if name.endswith((".yaml", ".yml"))]
    tagged = client.get_run(parent_id).data.tags.get(TAG_SPACE)
    if tagged in spaces:
        return fetch_artifact(client, uri, parent_id, tagged, folder)
    if not spaces or (len(spaces) > 1 and beside is None):
        raise LookupError(f"its parent run must hold one search space, but holds {', '.join(spaces) or 'none'}")
    return fetch_artifact(client, uri, parent_id, spaces[-1], folder)


def _artifacts_beside(uri: str, run_id: str) -> Path | None:
    """The folder of a run's files beside a sqlite database, where there is one."""
    database = sqlite_file(uri)
    folder = None if database is None else database.parent / ARTIFACTS / run_id / "artifacts"
    return folder if folder is not None and folder.is_dir() else None
