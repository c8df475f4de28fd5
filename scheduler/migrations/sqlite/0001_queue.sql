-- The queue and its history. Ids are 32 hex digits, times are milliseconds since 1970 (UTC), flags are 0 or 1, lists and
-- maps are JSON. ../postgres has the same tables; both are written by one program (src/queue/sql).

-- Reigns so far. Every write reads this row first, and no two reigns can be the newest.
CREATE TABLE reign (
    one   INTEGER PRIMARY KEY CHECK (one = 1),
    epoch INTEGER NOT NULL
) STRICT;
INSERT INTO reign (one, epoch) VALUES (1, 0);

-- Who leads, and when it last said so. In a table of its own: writes hold the row of `reign`.
CREATE TABLE leader (
    one     INTEGER PRIMARY KEY CHECK (one = 1),
    epoch   INTEGER NOT NULL,
    address TEXT NOT NULL,
    -- Name of its database sessions.
    owner   TEXT NOT NULL,
    beat    INTEGER NOT NULL
) STRICT;
INSERT INTO leader (one, epoch, address, owner, beat) VALUES (1, 0, '', '', 0);

CREATE TABLE farm (
    one    INTEGER PRIMARY KEY CHECK (one = 1),
    paused INTEGER NOT NULL CHECK (paused IN (0, 1))
) STRICT;
INSERT INTO farm (one, paused) VALUES (1, 0);

CREATE TABLE tenants (
    id     TEXT PRIMARY KEY,
    -- TenantSpec.
    spec   TEXT NOT NULL,
    paused INTEGER NOT NULL DEFAULT 0 CHECK (paused IN (0, 1))
) STRICT, WITHOUT ROWID;

CREATE TABLE drained (
    node TEXT PRIMARY KEY
) STRICT, WITHOUT ROWID;

-- The different sets of labels that jobs have. Many jobs share one.
CREATE TABLE label_sets (
    -- From the sha-256 of the labels; empty for no labels.
    id     TEXT PRIMARY KEY,
    labels TEXT NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO label_sets (id, labels) VALUES ('', '{}');

CREATE TABLE submissions (
    n            INTEGER PRIMARY KEY AUTOINCREMENT,
    id           TEXT NOT NULL UNIQUE,
    tenant       TEXT NOT NULL,
    model        TEXT,
    priority     INTEGER,
    -- As the user wrote them.
    after        TEXT NOT NULL,
    max_failures INTEGER,
    opened       INTEGER NOT NULL,
    committed    INTEGER,
    -- SubmissionReply, once committed: what a repeated commit answers.
    reply        TEXT,
    -- Its jobs, and how many of them were removed when they were old.
    jobs         INTEGER NOT NULL DEFAULT 0,
    pruned       INTEGER NOT NULL DEFAULT 0 CHECK (pruned <= jobs),
    paused       INTEGER NOT NULL DEFAULT 0 CHECK (paused IN (0, 1)),
    CHECK ((committed IS NULL) = (reply IS NULL))
) STRICT;
CREATE INDEX submissions_open ON submissions (opened) WHERE reply IS NULL;
CREATE INDEX submissions_committed ON submissions (committed, n) WHERE reply IS NOT NULL;

-- The file of a submission that is not committed yet.
CREATE TABLE submission_pages (
    submission INTEGER NOT NULL REFERENCES submissions (n),
    page       INTEGER NOT NULL,
    bytes      BLOB NOT NULL,
    PRIMARY KEY (submission, page)
) STRICT;

CREATE TABLE jobs (
    -- Order of submission.
    seq        INTEGER PRIMARY KEY,
    id         TEXT NOT NULL UNIQUE,
    -- The last 12 digits of the id backwards: finds a job by the ending of its id.
    tail       TEXT NOT NULL,
    -- sha-256 over content, model asked for and occurrence: the same line submitted twice is one job.
    key        TEXT NOT NULL UNIQUE,
    tenant     TEXT NOT NULL,
    -- RenderRequest.
    request    TEXT NOT NULL,
    -- What planning needs of the request: Ask, and the labels that the node has to have.
    ask        TEXT NOT NULL,
    require    TEXT NOT NULL,
    labels     TEXT NOT NULL,
    -- The same 64 bits, signed.
    seed       INTEGER NOT NULL,
    priority   INTEGER NOT NULL,
    -- Asked for or, from the first attempt on, used.
    model      TEXT,
    model_hash TEXT,
    -- RenderSpec, from the first attempt on.
    spec       TEXT,
    state      TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled')),
    paused     INTEGER NOT NULL DEFAULT 0 CHECK (paused IN (0, 1)),
    -- Why it failed.
    reason     TEXT,
    -- JobResult, once done, and the attempt that it is of.
    result     TEXT,
    accepted   INTEGER,
    warnings   TEXT NOT NULL DEFAULT '[]',
    -- The newest attempt; 0 before the first.
    attempt    INTEGER NOT NULL DEFAULT 0,
    -- Of the newest attempt.
    node       TEXT,
    -- Counts: what ended its attempts.
    counts     TEXT NOT NULL DEFAULT '{}',
    submitted  INTEGER NOT NULL,
    finished   INTEGER,
    -- Objects that nobody needs are gone from the store.
    clean      INTEGER NOT NULL DEFAULT 0 CHECK (clean IN (0, 1)),
    CHECK ((finished IS NULL) = (state IN ('queued', 'running'))),
    CHECK ((result IS NULL) = (state <> 'done')),
    CHECK ((accepted IS NULL) = (state <> 'done'))
) STRICT;
CREATE INDEX jobs_state ON jobs (state, seq);
CREATE INDEX jobs_tail ON jobs (tail);
CREATE INDEX jobs_labels ON jobs (labels) WHERE labels <> '';
CREATE INDEX jobs_live ON jobs (tenant) WHERE state IN ('queued', 'running');
CREATE INDEX jobs_ended ON jobs (finished, seq) WHERE finished IS NOT NULL;
CREATE INDEX jobs_unclean ON jobs (finished, seq) WHERE finished IS NOT NULL AND clean = 0;

CREATE TABLE submission_jobs (
    submission INTEGER NOT NULL REFERENCES submissions (n),
    job        INTEGER NOT NULL REFERENCES jobs (seq),
    PRIMARY KEY (submission, job)
) STRICT, WITHOUT ROWID;
CREATE INDEX submission_jobs_job ON submission_jobs (job, submission);

-- What jobs come after: a job or a batch.
CREATE TABLE dependencies (
    job      INTEGER NOT NULL REFERENCES jobs (seq),
    place    INTEGER NOT NULL,
    on_job   INTEGER REFERENCES jobs (seq),
    on_batch INTEGER REFERENCES submissions (n),
    PRIMARY KEY (job, place),
    CHECK ((on_job IS NULL) <> (on_batch IS NULL))
) STRICT, WITHOUT ROWID;
CREATE INDEX dependencies_on_job ON dependencies (on_job) WHERE on_job IS NOT NULL;
CREATE INDEX dependencies_on_batch ON dependencies (on_batch) WHERE on_batch IS NOT NULL;

CREATE TABLE attempts (
    job       INTEGER NOT NULL REFERENCES jobs (seq),
    attempt   INTEGER NOT NULL CHECK (attempt > 0),
    epoch     INTEGER NOT NULL,
    node      TEXT NOT NULL,
    boot      TEXT NOT NULL,
    devices   TEXT NOT NULL,
    -- Name of the devices.
    device    TEXT NOT NULL,
    model     TEXT NOT NULL,
    -- Who is charged.
    tenant    TEXT NOT NULL,
    -- Seconds that it would take by the devices' rates alone.
    base      REAL NOT NULL,
    started   INTEGER NOT NULL,
    ended     INTEGER,
    -- What its devices and helpers were held for, once it has ended.
    device_ms INTEGER CHECK (device_ms >= 0),
    outcome   TEXT NOT NULL CHECK (outcome IN ('running', 'completed', 'aborted', 'interrupted', 'input', 'device',
                                               'store', 'out_of_memory', 'node_lost')),
    message   TEXT,
    PRIMARY KEY (job, attempt),
    CHECK ((ended IS NULL) = (outcome = 'running')),
    CHECK ((device_ms IS NULL) = (outcome = 'running'))
) STRICT, WITHOUT ROWID;
-- Whatever the program believes: a job has at most one live attempt, and at most one that was accepted.
CREATE UNIQUE INDEX attempts_running ON attempts (job) WHERE outcome = 'running';
CREATE UNIQUE INDEX attempts_completed ON attempts (job) WHERE outcome = 'completed';
CREATE INDEX attempts_measured ON attempts (ended) WHERE outcome = 'completed';

-- What ended attempts used, by the hour of their end. Every figure is the sum over the attempts whose rows are there, plus
-- what removed rows had: `pruned` and `pruned_ms`.
CREATE TABLE ledger (
    -- Since 1970.
    hour      INTEGER NOT NULL,
    tenant    TEXT NOT NULL,
    device    TEXT NOT NULL,
    labels    TEXT NOT NULL,
    attempts  INTEGER NOT NULL,
    clips     INTEGER NOT NULL,
    device_ms INTEGER NOT NULL,
    lost_ms   INTEGER NOT NULL,
    pruned    INTEGER NOT NULL DEFAULT 0 CHECK (pruned <= attempts),
    pruned_ms INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (hour, tenant, device, labels)
) STRICT, WITHOUT ROWID;
CREATE INDEX ledger_labels ON ledger (labels) WHERE labels <> '';

CREATE TABLE job_log (
    job     INTEGER NOT NULL REFERENCES jobs (seq),
    n       INTEGER NOT NULL,
    at      INTEGER NOT NULL,
    attempt INTEGER,
    line    TEXT NOT NULL,
    PRIMARY KEY (job, n)
) STRICT, WITHOUT ROWID;

-- Who did what.
CREATE TABLE audit (
    n       INTEGER PRIMARY KEY AUTOINCREMENT,
    at      INTEGER NOT NULL,
    who     TEXT NOT NULL,
    action  TEXT NOT NULL,
    subject TEXT NOT NULL,
    detail  TEXT NOT NULL
) STRICT;
