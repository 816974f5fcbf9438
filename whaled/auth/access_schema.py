"""The tables of the access database. Pure.

Each statement leaves an existing table as it is, so that every start may run all of them. A column is never changed or
removed; a new meaning gets a new table.
"""

# Marks the file as this program's (https://www.sqlite.org/fileformat.html, 1.3.17): "whac".
APPLICATION_ID = 0x77686163
# A whaled refuses a database with a higher version, and leaves it unchanged.
VERSION = 1

TABLES: tuple[str, ...] = (
    # What an operator or a client with the permission `admin` did. Rows are only added, and removed by age.
    """CREATE TABLE IF NOT EXISTS audit (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        actor TEXT NOT NULL,
        origin TEXT NOT NULL,
        act TEXT NOT NULL,
        target TEXT NOT NULL,
        outcome TEXT NOT NULL,
        detail TEXT NOT NULL
    ) STRICT""",
    # `kind` is a `revocations.Kind`. A client's tokens are revoked if issued until `at`. The daemon reads the rows
    # above the highest `seq` that it knows, so a row that changes gets a new one.
    """CREATE TABLE IF NOT EXISTS revocations (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL,
        name TEXT NOT NULL,
        at REAL NOT NULL,
        until REAL NOT NULL,
        UNIQUE (kind, name)
    ) STRICT""",
    """CREATE TRIGGER IF NOT EXISTS audit_unchanged BEFORE UPDATE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END""",
    # What was issued: never the token itself. `family` is the jti of the first token of a chain of refreshes.
    """CREATE TABLE IF NOT EXISTS issued (
        jti TEXT PRIMARY KEY,
        family TEXT NOT NULL,
        client_id TEXT NOT NULL,
        permissions TEXT NOT NULL,
        issued_at REAL NOT NULL,
        expires_at REAL NOT NULL,
        kid TEXT,
        issued_by TEXT NOT NULL
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS issued_by_client ON issued (client_id)",
    "CREATE INDEX IF NOT EXISTS issued_by_expiry ON issued (expires_at)",
    # API keys: the SHA-256 of each, never the key. `permissions` and `networks` are separated by blanks.
    """CREATE TABLE IF NOT EXISTS api_keys (
        id TEXT PRIMARY KEY,
        digest BLOB NOT NULL UNIQUE,
        client_id TEXT NOT NULL,
        comment TEXT NOT NULL,
        permissions TEXT NOT NULL,
        filter TEXT,
        rate REAL,
        networks TEXT NOT NULL,
        created_at REAL NOT NULL,
        created_by TEXT NOT NULL,
        expires_at REAL,
        revoked_at REAL,
        last_used_at REAL
    ) STRICT, WITHOUT ROWID""",
)
