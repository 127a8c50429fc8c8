-- What every call used, and the sums of it. Times are microseconds since 1970 (UTC).
CREATE TABLE usage_events (
    -- A UUID of version 7, so that new rows stand together.
    event_id               TEXT   NOT NULL PRIMARY KEY,
    time                   BIGINT NOT NULL,
    service                TEXT   NOT NULL,
    method                 TEXT   NOT NULL,
    -- '': it succeeded.
    error_code             TEXT   NOT NULL,
    grpc_status            TEXT   NOT NULL,
    key_id                 TEXT   NOT NULL,
    user_id                TEXT   NOT NULL,
    owner                  TEXT   NOT NULL,
    model                  TEXT   NOT NULL,
    task                   TEXT   NOT NULL,
    prompt_tokens          BIGINT NOT NULL,
    completion_tokens      BIGINT NOT NULL,
    duration_us            BIGINT NOT NULL,
    time_to_first_token_us BIGINT,
    inter_token_us         BIGINT,
    -- 0: no cache was asked, 1: one was, 2: and it answered.
    cache                  BIGINT NOT NULL
);
CREATE INDEX usage_events_by_time ON usage_events (time);

CREATE TABLE performance_rollups (
    -- How long it is, in seconds: 1, 60, 3600 or 86400.
    seconds        BIGINT NOT NULL,
    start_time     BIGINT NOT NULL,
    method         TEXT   NOT NULL,
    model          TEXT   NOT NULL,
    requests       BIGINT NOT NULL,
    errors         BIGINT NOT NULL,
    tokens         BIGINT NOT NULL,
    -- Requests that used any.
    token_requests BIGINT NOT NULL,
    cacheable      BIGINT NOT NULL,
    cached         BIGINT NOT NULL,
    -- The sum.
    duration_us    BIGINT NOT NULL,
    -- Of durations, times to the first token and times between tokens: see sketch.rs.
    sketches       TEXT   NOT NULL,
    PRIMARY KEY (seconds, start_time, method, model)
);

CREATE TABLE usage_days (
    -- When it began.
    day               BIGINT NOT NULL,
    owner             TEXT   NOT NULL,
    key_id            TEXT   NOT NULL,
    user_id           TEXT   NOT NULL,
    model             TEXT   NOT NULL,
    requests          BIGINT NOT NULL,
    errors            BIGINT NOT NULL,
    prompt_tokens     BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    PRIMARY KEY (day, owner, key_id, user_id, model)
);
CREATE INDEX usage_days_of_an_owner ON usage_days (owner, day);
