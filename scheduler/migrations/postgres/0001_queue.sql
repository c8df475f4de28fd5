-- The queue and its history. Ids are 32 hex digits, times are milliseconds since 1970 (UTC), flags are 0 or 1, lists and
-- maps are JSON. ../sqlite has the same tables; both are written by one program (src/queue/sql).
-- Text is compared by bytes, as SQLite does it.

-- Reigns so far. Every write reads this row first, and no two reigns can be the newest.
CREATE TABLE reign (
    one   BIGINT PRIMARY KEY CHECK (one = 1),
    epoch BIGINT NOT NULL
);
INSERT INTO reign (one, epoch) VALUES (1, 0);

-- Who leads, and when it last said so. In a table of its own: writes hold the row of `reign`.
CREATE TABLE leader (
    one     BIGINT PRIMARY KEY CHECK (one = 1),
    epoch   BIGINT NOT NULL,
    address TEXT COLLATE "C" NOT NULL,
    -- Name of its database sessions.
    owner   TEXT COLLATE "C" NOT NULL,
    beat    BIGINT NOT NULL
);
INSERT INTO leader (one, epoch, address, owner, beat) VALUES (1, 0, '', '', 0);

CREATE TABLE farm (
    one    BIGINT PRIMARY KEY CHECK (one = 1),
    paused BIGINT NOT NULL CHECK (paused IN (0, 1))
);
INSERT INTO farm (one, paused) VALUES (1, 0);

CREATE TABLE tenants (
    id     TEXT COLLATE "C" PRIMARY KEY,
    -- TenantSpec.
    spec   TEXT COLLATE "C" NOT NULL,
    paused BIGINT NOT NULL DEFAULT 0 CHECK (paused IN (0, 1))
);

CREATE TABLE drained (
    node TEXT COLLATE "C" PRIMARY KEY
);

-- The different sets of labels that jobs have. Many jobs share one.
CREATE TABLE label_sets (
    -- From the sha-256 of the labels; empty for no labels.
    id     TEXT COLLATE "C" PRIMARY KEY,
    labels TEXT COLLATE "C" NOT NULL
);
INSERT INTO label_sets (id, labels) VALUES ('', '{}');

CREATE TABLE submissions (
    n            BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id           TEXT COLLATE "C" NOT NULL UNIQUE,
    tenant       TEXT COLLATE "C" NOT NULL,
    model        TEXT COLLATE "C",
    priority     BIGINT,
    -- As the user wrote them.
    after        TEXT COLLATE "C" NOT NULL,
    max_failures BIGINT,
    opened       BIGINT NOT NULL,
    committed    BIGINT,
    -- SubmissionReply, once committed: what a repeated commit answers.
    reply        TEXT COLLATE "C",
    -- Its jobs, and how many of them were removed when they were old.
    jobs         BIGINT NOT NULL DEFAULT 0,
    pruned       BIGINT NOT NULL DEFAULT 0 CHECK (pruned <= jobs),
    paused       BIGINT NOT NULL DEFAULT 0 CHECK (paused IN (0, 1)),
    CHECK ((committed IS NULL) = (reply IS NULL))
);
CREATE INDEX submissions_open ON submissions (opened) WHERE reply IS NULL;
CREATE INDEX submissions_committed ON submissions (committed, n) WHERE reply IS NOT NULL;

-- The file of a submission that is not committed yet.
CREATE TABLE submission_pages (
    submission BIGINT NOT NULL REFERENCES submissions (n),
    page       BIGINT NOT NULL,
    bytes      BYTEA NOT NULL,
    PRIMARY KEY (submission, page)
);

CREATE TABLE jobs (
    -- Order of submission.
    seq        BIGINT PRIMARY KEY,
    id         TEXT COLLATE "C" NOT NULL UNIQUE,
    -- The last 12 digits of the id backwards: finds a job by the ending of its id.
    tail       TEXT COLLATE "C" NOT NULL,
    -- sha-256 over content, model asked for and occurrence: the same line submitted twice is one job.
    key        TEXT COLLATE "C" NOT NULL UNIQUE,
    tenant     TEXT COLLATE "C" NOT NULL,
    -- RenderRequest.
    request    TEXT COLLATE "C" NOT NULL,
    -- What planning needs of the request: Ask, and the labels that the node has to have.
    ask        TEXT COLLATE "C" NOT NULL,
    require    TEXT COLLATE "C" NOT NULL,
    labels     TEXT COLLATE "C" NOT NULL,
    -- The same 64 bits, signed.
    seed       BIGINT NOT NULL,
    priority   BIGINT NOT NULL,
    -- Asked for or, from the first attempt on, used.
    model      TEXT COLLATE "C",
    model_hash TEXT COLLATE "C",
    -- RenderSpec, from the first attempt on.
    spec       TEXT COLLATE "C",
    state      TEXT COLLATE "C" NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled')),
    paused     BIGINT NOT NULL DEFAULT 0 CHECK (paused IN (0, 1)),
    -- Why it failed.
    reason     TEXT COLLATE "C",
    -- JobResult, once done, and the attempt that it is of.
    result     TEXT COLLATE "C",
    accepted   BIGINT,
    warnings   TEXT COLLATE "C" NOT NULL DEFAULT '[]',
    -- The newest attempt; 0 before the first.
    attempt    BIGINT NOT NULL DEFAULT 0,
    -- Of the newest attempt.
    node       TEXT COLLATE "C",
    -- Counts: what ended its attempts.
    counts     TEXT COLLATE "C" NOT NULL DEFAULT '{}',
    submitted  BIGINT NOT NULL,
    finished   BIGINT,
    -- Objects that nobody needs are gone from the store.
    clean      BIGINT NOT NULL DEFAULT 0 CHECK (clean IN (0, 1)),
    CHECK ((finished IS NULL) = (state IN ('queued', 'running'))),
    CHECK ((result IS NULL) = (state <> 'done')),
    CHECK ((accepted IS NULL) = (state <> 'done'))
);
CREATE INDEX jobs_state ON jobs (state, seq);
CREATE INDEX jobs_tail ON jobs (tail);
CREATE INDEX jobs_labels ON jobs (labels) WHERE labels <> '';
CREATE INDEX jobs_live ON jobs (tenant) WHERE state IN ('queued', 'running');
CREATE INDEX jobs_ended ON jobs (finished, seq) WHERE finished IS NOT NULL;
CREATE INDEX jobs_unclean ON jobs (finished, seq) WHERE finished IS NOT NULL AND clean = 0;

CREATE TABLE submission_jobs (
    submission BIGINT NOT NULL REFERENCES submissions (n),
    job        BIGINT NOT NULL REFERENCES jobs (seq),
    PRIMARY KEY (submission, job)
);
CREATE INDEX submission_jobs_job ON submission_jobs (job, submission);

-- What jobs come after: a job or a batch.
CREATE TABLE dependencies (
    job      BIGINT NOT NULL REFERENCES jobs (seq),
    place    BIGINT NOT NULL,
    on_job   BIGINT REFERENCES jobs (seq),
    on_batch BIGINT REFERENCES submissions (n),
    PRIMARY KEY (job, place),
    CHECK ((on_job IS NULL) <> (on_batch IS NULL))
);
CREATE INDEX dependencies_on_job ON dependencies (on_job) WHERE on_job IS NOT NULL;
CREATE INDEX dependencies_on_batch ON dependencies (on_batch) WHERE on_batch IS NOT NULL;

CREATE TABLE attempts (
    job       BIGINT NOT NULL REFERENCES jobs (seq),
    attempt   BIGINT NOT NULL CHECK (attempt > 0),
    epoch     BIGINT NOT NULL,
    node      TEXT COLLATE "C" NOT NULL,
    boot      TEXT COLLATE "C" NOT NULL,
    devices   TEXT COLLATE "C" NOT NULL,
    -- Name of the devices.
    device    TEXT COLLATE "C" NOT NULL,
    model     TEXT COLLATE "C" NOT NULL,
    -- Who is charged.
    tenant    TEXT COLLATE "C" NOT NULL,
    -- Seconds that it would take by the devices' rates alone.
    base      DOUBLE PRECISION NOT NULL,
    started   BIGINT NOT NULL,
    ended     BIGINT,
    -- What its devices and helpers were held for, once it has ended.
    device_ms BIGINT CHECK (device_ms >= 0),
    outcome   TEXT COLLATE "C" NOT NULL CHECK (outcome IN ('running', 'completed', 'aborted', 'interrupted', 'input', 'device',
                                               'store', 'out_of_memory', 'node_lost')),
    message   TEXT COLLATE "C",
    PRIMARY KEY (job, attempt),
    CHECK ((ended IS NULL) = (outcome = 'running')),
    CHECK ((device_ms IS NULL) = (outcome = 'running'))
);
-- Whatever the program believes: a job has at most one live attempt, and at most one that was accepted.
CREATE UNIQUE INDEX attempts_running ON attempts (job) WHERE outcome = 'running';
CREATE UNIQUE INDEX attempts_completed ON attempts (job) WHERE outcome = 'completed';
CREATE INDEX attempts_measured ON attempts (ended) WHERE outcome = 'completed';

-- What ended attempts used, by the hour of their end. Every figure is the sum over the attempts whose rows are there, plus
-- what removed rows had: `pruned` and `pruned_ms`.
CREATE TABLE ledger (
    -- Since 1970.
    hour      BIGINT NOT NULL,
    tenant    TEXT COLLATE "C" NOT NULL,
    device    TEXT COLLATE "C" NOT NULL,
    labels    TEXT COLLATE "C" NOT NULL,
    attempts  BIGINT NOT NULL,
    clips     BIGINT NOT NULL,
    device_ms BIGINT NOT NULL,
    lost_ms   BIGINT NOT NULL,
    pruned    BIGINT NOT NULL DEFAULT 0 CHECK (pruned <= attempts),
    pruned_ms BIGINT NOT NULL DEFAULT 0,
    PRIMARY KEY (hour, tenant, device, labels)
);
CREATE INDEX ledger_labels ON ledger (labels) WHERE labels <> '';

CREATE TABLE job_log (
    job     BIGINT NOT NULL REFERENCES jobs (seq),
    n       BIGINT NOT NULL,
    at      BIGINT NOT NULL,
    attempt BIGINT,
    line    TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (job, n)
);

-- Who did what.
CREATE TABLE audit (
    n       BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at      BIGINT NOT NULL,
    who     TEXT COLLATE "C" NOT NULL,
    action  TEXT COLLATE "C" NOT NULL,
    subject TEXT COLLATE "C" NOT NULL,
    detail  TEXT COLLATE "C" NOT NULL
);
