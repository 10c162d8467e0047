"""Error messages of the database: the message of the server, the driver or a pooler, and what to do about it.

When to add here: advice for another error, in `_ADVICE`. Keep out: errors that this package raises itself.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import psycopg2
import psycopg2.extensions

from songvec_assets.errors import DatabaseError

_GO_ON = "start the same command again"
_SHARED_MEMORY = r"could not \w+ shared memory segment"

_ADVICE = {
    "database.full": {
        _SHARED_MEMORY: "the server's shared memory, /dev/shm, is full, not its disk: give its container more, as "
        "`docker run --shm-size=1g` does (64 MB otherwise), or let it work without parallel workers: ALTER DATABASE … "
        "SET max_parallel_maintenance_workers = 0, and max_parallel_workers_per_gather = 0",
        r"^53100": f"the server's disk is full: free space, then {_GO_ON}; nothing is half-loaded",
        r"^53200": "the server ran out of memory: lower SONGVEC_INDEX_MEMORY_MB or SONGVEC_LISTS",
        r"too many connections for (role|database)": "the role or the database has a limit of its own: let an "
        "administrator raise it, with ALTER ROLE or ALTER DATABASE … CONNECTION LIMIT; a run may take twenty",
        r"^53300|too many clients|too many connections|remaining connection slots": "the server has no "
        "connection left: raise max_connections or stop other clients",
        r"query_wait_timeout": f"no session of the pooler became free: raise its default_pool_size, then {_GO_ON}",
        r"no more connections allowed": "the pooler takes no more clients: raise its max_client_conn, or stop others",
    },
    "database.locked": {
        r"^23505": f"another session wrote the same row meanwhile: {_GO_ON}",
        r"^55P03": f"another session holds a lock on the table: wait for it, then {_GO_ON}",
    },
    "database.no-right": {
        r"^42501": "this user lacks a right: let the owner grant it, or use another user in POSTGRES_URL",
    },
    "database.read-only": {
        r"^25006": "this server takes no writes: put the primary's address into POSTGRES_URL if it is a standby; else "
        "see default_transaction_read_only, which some hosts set when the disk is nearly full",
    },
    "database.login": {
        r"^28P01|password authentication failed|no password supplied": "the password is wrong: correct POSTGRES_URL",
        r'^28000|role ".*" does not exist|no pg_hba.conf entry': "the server refuses this user from here: check "
        "POSTGRES_URL and pg_hba.conf",
        r'^3D000|database ".*" does not exist': "there is no such database: create it, or correct POSTGRES_URL",
        r"server_login_retry|server login (has been )?fail|cannot connect to server|client_login_timeout": "the pooler "
        "does not get into the server: is it running, is what the pooler knows of it right? See its log",
        r"no such (database|user)": "the pooler does not know it: correct POSTGRES_URL, or the pooler's configuration",
        r"unsupported startup parameter": "the pooler refuses a parameter at the end of POSTGRES_URL: leave it out",
    },
    "database.extension": {
        r'^3F000 (?!.*schema "songvec")': "the search_path of this user names no schema that is there: ALTER "
        "ROLE … SET search_path = public",
        r'type "(vector|halfvec)" does not exist|operator does not exist: \S+ <=> ': "the extension `vector` is not "
        "in this database, or in a schema that this user's search_path lacks: ALTER ROLE … SET search_path = …, "
        "its schema",
    },
    "database.unavailable": {
        r'schema "songvec" does not exist|relation "songvec\.\w+" does not exist': "the tables of this package were "
        "dropped, or another database took the place of this one, while this process ran: restore them or run `songvec "
        "run`, then start it again",
        r"^57014": f"the statement was cancelled, by a person or the role's statement_timeout; {_GO_ON}",
        r"^57P01|administrator command|unexpected postmaster exit": "the server was shut down; "
        f"{_GO_ON} when it is back",
        r"^57P02|crash of another server process": "the server lost a process, often for lack of memory, and restarts: "
        f"see its log, then {_GO_ON}",
        r"^57P03|is (starting up|shutting down|in recovery mode|not accepting|not yet accepting)": "the server is "
        f"starting or shutting down; {_GO_ON} when it is up",
        r"due to \S+ timeout": f"a timeout that the server or the role sets ended it: raise that, then {_GO_ON}",
        r"idle.transaction.timeout": f"the pooler ends transactions that hold a lock: let it not, then {_GO_ON}",
        r"query[ _]timeout": f"the pooler ends statements that take long: let it not, then {_GO_ON}",
        r"could not translate host name": "the host's name does not resolve: correct POSTGRES_URL",
        r"could not connect|Connection refused|timeout expired|No such file or directory|Network is unreachable": "no "
        "server answers there: is it running, is the address in POSTGRES_URL right, does a firewall stand between?",
        r"server (closed the connection|conn crashed)|SSL connection has been closed|connection already closed"
        r"|could not receive": f"the connection broke: what was committed is kept, {_GO_ON}",
    },
}
"""Advice by error code and by pattern; patterns are searched, in order, in the SQLSTATE, a space and the message.
Errors of PgBouncer have no SQLSTATE."""


def read_database_error(error: BaseException | None) -> DatabaseError:
    """The server's message on one line, and what to do about it."""
    message = " ".join(str(error).split())
    state = getattr(error, "pgcode", None) or getattr(error, "sqlstate", None)  # psycopg2's, or ADBC's
    for code, patterns in _ADVICE.items():
        for pattern, advice in patterns.items():
            if re.search(pattern, f"{state or ''} {message}"):
                return DatabaseError(f"Postgres: {message} ({advice})", code)
    return DatabaseError(f"Postgres: {message}")


def lacks_shared_memory(error: BaseException) -> bool:
    """Whether the server had no shared memory for parallel workers: without them the statement may succeed."""
    return re.search(_SHARED_MEMORY, str(error)) is not None


class ReportingCursor(psycopg2.extensions.cursor):  # type: ignore[misc]
    """A cursor of psycopg2 whose errors also say why the server closed the connection."""

    def execute(self, query: Any, parameters: Any = None) -> None:
        """See psycopg2."""
        with _with_last_words(self.connection):
            super().execute(query, parameters)

    def copy_expert(self, sql: Any, file: Any, size: int = 8192) -> None:
        """See psycopg2."""
        with _with_last_words(self.connection):
            super().copy_expert(sql, file, size)


@contextlib.contextmanager
def _with_last_words(connection: Any) -> Iterator[None]:
    try:
        yield
    except psycopg2.OperationalError as error:
        if not connection.closed:
            raise
        # the server reports a crash as a notice, everything else as the connection's error
        notices = [notice.partition("\n")[0] for notice in connection.notices if "terminating connection" in notice]
        raise psycopg2.OperationalError("\n".join([*notices, connection.info.error_message or str(error)])) from error
