-- The queue and its history. Ids are 32 hex digits, times are milliseconds since 1970 (UTC), lists are JSON.

CREATE TABLE meta (
    one   INTEGER PRIMARY KEY CHECK (one = 1),
    -- Reigns so far. Grows by one at each start of a scheduler; every write checks it.
    epoch INTEGER NOT NULL
);
INSERT INTO meta (one, epoch) VALUES (1, 0);

CREATE TABLE jobs (
    -- Order of submission.
    seq        INTEGER PRIMARY KEY,
    id         TEXT NOT NULL UNIQUE,
    -- The last 12 digits of the id backwards: finds a job by the ending of its id.
    tail       TEXT NOT NULL,
    -- sha-256 over content, model asked for and occurrence: the same line submitted twice is one job.
    key        BLOB NOT NULL UNIQUE,
    -- RenderRequest.
    request    TEXT NOT NULL,
    seed       INTEGER NOT NULL,
    priority   INTEGER NOT NULL,
    -- Asked for or, from the first attempt on, used.
    model      TEXT,
    model_hash TEXT,
    -- RenderSpec, from the first attempt on.
    spec       TEXT,
    state      TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled')),
    -- Why it failed.
    reason     TEXT,
    -- JobResult, once done.
    result     TEXT,
    warnings   TEXT NOT NULL DEFAULT '[]',
    -- The newest attempt; 0 before the first.
    attempt    INTEGER NOT NULL DEFAULT 0,
    -- Of the newest attempt.
    node       TEXT,
    -- Attempts that a device or the store, or the loss of a node, ended since a user last queued the job.
    failures   INTEGER NOT NULL DEFAULT 0,
    losses     INTEGER NOT NULL DEFAULT 0,
    submitted  INTEGER NOT NULL,
    finished   INTEGER
) STRICT;
CREATE INDEX jobs_state ON jobs (state, seq);
CREATE INDEX jobs_tail ON jobs (tail);

CREATE TABLE attempts (
    job     INTEGER NOT NULL REFERENCES jobs (seq),
    attempt INTEGER NOT NULL,
    epoch   INTEGER NOT NULL,
    node    TEXT NOT NULL,
    boot    TEXT NOT NULL,
    devices TEXT NOT NULL,
    started INTEGER NOT NULL,
    ended   INTEGER,
    -- 'running', 'completed', 'aborted', or the kind of failure.
    outcome TEXT NOT NULL,
    message TEXT,
    PRIMARY KEY (job, attempt)
) STRICT, WITHOUT ROWID;
-- A job has at most one live attempt, whatever the program believes.
CREATE UNIQUE INDEX attempts_running ON attempts (job) WHERE outcome = 'running';

CREATE TABLE submissions (
    id        TEXT PRIMARY KEY,
    model     TEXT,
    priority  INTEGER,
    opened    INTEGER NOT NULL,
    -- SubmissionReply, once committed: what a repeated commit answers.
    reply     TEXT
) STRICT, WITHOUT ROWID;
CREATE INDEX submissions_open ON submissions (opened) WHERE reply IS NULL;

-- The file of a submission that is not committed yet.
CREATE TABLE submission_pages (
    submission TEXT NOT NULL REFERENCES submissions (id),
    page       INTEGER NOT NULL,
    bytes      BLOB NOT NULL,
    PRIMARY KEY (submission, page)
) STRICT;

CREATE TABLE submission_jobs (
    submission TEXT NOT NULL REFERENCES submissions (id),
    job        INTEGER NOT NULL REFERENCES jobs (seq),
    PRIMARY KEY (submission, job)
) STRICT, WITHOUT ROWID;

CREATE TABLE job_log (
    job     INTEGER NOT NULL REFERENCES jobs (seq),
    n       INTEGER NOT NULL,
    at      INTEGER NOT NULL,
    attempt INTEGER,
    line    TEXT NOT NULL,
    PRIMARY KEY (job, n)
) STRICT, WITHOUT ROWID;
