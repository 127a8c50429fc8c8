-- What went wrong. Times are microseconds since 1970 (UTC).

-- One row. Whoever changes anything locks it first, so occurrences are numbered in the order of commits.
CREATE TABLE error_head (
    id           BIGINT NOT NULL PRIMARY KEY,
    sequence     BIGINT NOT NULL,
    -- How many occurrences are kept.
    total        BIGINT NOT NULL,
    -- When old ones were last removed; 0: never.
    cleanup_time BIGINT NOT NULL
);

INSERT INTO error_head (id, sequence, total, cleanup_time) VALUES (1, 0, 0, 0);

-- Every occurrence, in short.
CREATE TABLE error_occurrences (
    sequence    BIGINT NOT NULL PRIMARY KEY,
    event_id    TEXT   NOT NULL UNIQUE,
    incident_id TEXT   NOT NULL,
    fingerprint TEXT   NOT NULL,
    time        BIGINT NOT NULL
);

-- Not unique: two services may tell what one user was shown, and neither must be lost.
CREATE INDEX error_occurrences_shown ON error_occurrences (incident_id) WHERE incident_id <> '';
CREATE INDEX error_occurrences_newest ON error_occurrences (fingerprint, time DESC);
CREATE INDEX error_occurrences_oldest ON error_occurrences (time);

-- All there is to know: of what a user was shown, and of a sample of the others.
CREATE TABLE error_details (
    sequence   BIGINT NOT NULL PRIMARY KEY,
    -- Rows of error_texts.
    message    TEXT   NOT NULL,
    causes     TEXT   NOT NULL,
    service    TEXT   NOT NULL,
    version    TEXT   NOT NULL,
    request_id TEXT   NOT NULL,
    trace_id   TEXT   NOT NULL,
    actor      TEXT   NOT NULL,
    owner      TEXT   NOT NULL,
    -- Microseconds; -1: unknown.
    duration   BIGINT NOT NULL,
    recovered  BIGINT NOT NULL
);

-- Long texts, once each.
CREATE TABLE error_texts (
    hash      TEXT   NOT NULL PRIMARY KEY,
    words     TEXT   NOT NULL,
    -- Nothing that happened later has it.
    last_time BIGINT NOT NULL
);

CREATE INDEX error_texts_oldest ON error_texts (last_time);

-- Occurrences of a cause in a minute (width 60000000) or an hour (3600000000).
CREATE TABLE error_counts (
    width       BIGINT NOT NULL,
    start       BIGINT NOT NULL,
    fingerprint TEXT   NOT NULL,
    total       BIGINT NOT NULL,
    PRIMARY KEY (width, start, fingerprint)
);

-- Who met a cause in an hour, and (start 0) ever.
CREATE TABLE error_owners (
    fingerprint TEXT   NOT NULL,
    start       BIGINT NOT NULL,
    owner       TEXT   NOT NULL,
    last_time   BIGINT NOT NULL,
    PRIMARY KEY (fingerprint, start, owner)
);

CREATE INDEX error_owners_oldest ON error_owners (last_time);

-- A cause, and the incident that was made of it; incident_id '': none was.
CREATE TABLE error_patterns (
    fingerprint         TEXT   NOT NULL PRIMARY KEY,
    incident_id         TEXT   NOT NULL,
    error_code          TEXT   NOT NULL,
    method              TEXT   NOT NULL,
    message             TEXT   NOT NULL,
    status              TEXT   NOT NULL,
    total               BIGINT NOT NULL,
    recovered_count     BIGINT NOT NULL,
    affected_users      BIGINT NOT NULL,
    first_seen          BIGINT NOT NULL,
    last_seen           BIGINT NOT NULL,
    reopened            BIGINT NOT NULL,
    resolved_in_version TEXT   NOT NULL,
    last_seen_version   TEXT   NOT NULL,
    -- 0: its status never changed.
    status_time         BIGINT NOT NULL,
    status_actor        TEXT   NOT NULL,
    note                TEXT   NOT NULL
);

CREATE UNIQUE INDEX error_patterns_incident ON error_patterns (incident_id) WHERE incident_id <> '';
CREATE INDEX error_patterns_last_seen ON error_patterns (last_seen DESC, incident_id DESC);
