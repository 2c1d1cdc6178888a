"""MLflow's database in a SQLite file: made aside and renamed, by one maker at a time, so that none is half made."""

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

OTHERS_S = 10.0  # a file without tables that was touched since may still be in the making, by another program


def prepare(uri: str) -> None:
    """Makes the database of a `sqlite:` URI where there is none.

    Raises:
        ValueError: the file is no MLflow database, or it cannot be made; says what to do.
    """
    from sqlalchemy.engine import make_url

    name = make_url(uri).database
    if not name or name == ":memory:" or name.startswith("file:"):
        return
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _is_missing(path):
            with _one_maker(path.with_name(f".{path.name}.making")):
                if _is_missing(path):
                    _make(path)
    except OSError as error:
        raise ValueError(f"MLflow's database {path} cannot be made: {error}") from None
    while (flaw := _flaw(path)) is not None:
        if time.time() - path.stat().st_mtime > OTHERS_S:
            raise ValueError(broken(path, flaw))
        time.sleep(0.2)


def broken(path: Path, flaw: str) -> str:
    """The line for a database that cannot be used."""
    return (
        f"MLflow's database {path} is broken ({flaw}): move it away, for example mv {path} {path}.broken, and run the "
        f"same command again; it makes a new one, and a training goes on in a new MLflow run"
    )


def _is_missing(path: Path) -> bool:
    """Also where somebody opened it and wrote nothing."""
    return not path.exists() or path.stat().st_size == 0


@contextmanager
def _one_maker(lock: Path) -> Iterator[None]:
    """Holds `lock`, which is gone afterwards; the kernel lets go of it with a process that dies."""
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                continue  # the maker before removed it
            try:
                yield
            finally:
                lock.unlink()
            return


def _make(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy.exc import SQLAlchemyError

    for left in path.parent.glob(f".{path.name}.building-*"):
        left.unlink()  # of makers that were killed: only one is at work
    building = path.with_name(f".{path.name}.building-{os.getpid()}")
    try:
        store = SqlAlchemyStore(f"sqlite:///{building}", str(path.absolute().parent / "mlflow-artifacts"))
        store.engine.dispose()
        building.replace(path)
    except SQLAlchemyError as error:
        raise ValueError(f"MLflow's database {path} cannot be made: {str(error).partition(chr(10))[0]}") from None
    finally:
        for left in path.parent.glob(f"{building.name}*"):
            left.unlink()


def _flaw(path: Path) -> str | None:
    """Why the file is no whole MLflow database; None where it is one, or is in use."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=10)) as database:
            made = database.execute("SELECT count(*) FROM alembic_version").fetchone()[0]
    except sqlite3.OperationalError as error:
        return "its making was cut off" if "no such table" in str(error) else None
    except sqlite3.DatabaseError as error:
        return str(error)
    return None if made else "its making was cut off"
