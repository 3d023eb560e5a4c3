"""Packs on object storage: whoever decodes first puts a pack there, and every other machine fetches it once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fqsweep.errors import StoreError
from fqsweep.files import write_whole

PACK_STORE_VARIABLE = "FQSWEEP_PACK_STORE"
COPY_BYTES = 1 << 24


def fetch_pack(store: str, path: Path) -> bool:
    """Copy a pack and its record, record last, to ``path``; False where the store has none.

    Args:
        store: address of a folder that pyarrow can open (``s3://bucket/packs``, ``gs://...``, ``file:///...``);
            credentials come from the environment.
        path: where the pack shall lie; its name is its name in the store.

    Raises:
        StoreError: the store cannot be read.
    """
    with _opened(store) as (system, folder):
        if not system.get_file_info(f"{folder}/{path.with_suffix('.json').name}").is_file:
            return False
        for target in (path, path.with_suffix(".json")):
            with system.open_input_stream(f"{folder}/{target.name}") as source:
                write_whole(target, partial(shutil.copyfileobj, source, length=COPY_BYTES))
    return True


def put_pack(store: str, path: Path) -> None:
    """Copy a pack and its record, record last, to the store.

    Raises:
        StoreError: the store cannot be written.
    """
    with _opened(store) as (system, folder):
        system.create_dir(folder, recursive=True)
        for source in (path, path.with_suffix(".json")):
            with (
                source.open("rb") as stream,
                system.open_output_stream(f"{folder}/{source.name}") as target,
            ):
                shutil.copyfileobj(stream, target, COPY_BYTES)


@contextmanager
def _opened(store: str) -> Iterator[tuple[Any, str]]:
    """The file system of an address and the folder in it; its errors as ``StoreError``."""
    from pyarrow import fs  # only where there is a store

    try:
        system, folder = fs.FileSystem.from_uri(store)
        yield system, folder.rstrip("/")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of a file here: pyarrow's errors name theirs in the text
        raise StoreError(
            f"{PACK_STORE_VARIABLE}={store}: {error}; correct the address or the credentials in the environment, or "
            "unset it to decode here"
        ) from error
