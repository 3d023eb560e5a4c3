"""Tracking URIs, as the driver and the analysis both meet them."""

from __future__ import annotations

from urllib.parse import urlsplit

CONNECT_S = 10


def is_server(uri: str) -> bool:
    """Whether an MLflow server answers there, rather than a database.

    >>> is_server("http://127.0.0.1:5000"), is_server("sqlite:////data/mlflow.db")
    (True, False)
    """
    return urlsplit(uri).scheme in ("http", "https")


def without_password(text: str, *, of: str) -> str:
    """The text without the name and password that the URI ``of`` holds.

    >>> without_password("no answer from http://me:secret@host", of="http://me:secret@host")
    'no answer from http://host'
    """
    signed_in, at, _ = urlsplit(of).netloc.rpartition("@")
    return text.replace(signed_in + at, "") if at else text


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
