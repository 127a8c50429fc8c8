-- Texts of keys apart from keys, users, sessions, token budgets, and the audit log.
-- SQLite can't drop a UNIQUE column: the table of keys is made anew.
CREATE TABLE key_texts (
    -- HMAC-SHA-256 with the pepper over the SHA-256 of the text, in hex.
    hash          TEXT   NOT NULL PRIMARY KEY,
    key_id        TEXT   NOT NULL,
    create_time   BIGINT NOT NULL,
    -- When a rotation ends it.
    expire_time   BIGINT,
    last_use_time BIGINT
);
CREATE INDEX key_texts_of_a_key ON key_texts (key_id, create_time);
INSERT INTO key_texts (hash, key_id, create_time) SELECT hash, key_id, create_time FROM keys;

CREATE TABLE keys_with_budgets (
    key_id         TEXT   NOT NULL PRIMARY KEY,
    name           TEXT   NOT NULL,
    -- The id of a user, or any other name.
    owner          TEXT   NOT NULL,
    scopes         TEXT   NOT NULL,
    rate_limits    TEXT   NOT NULL,
    allowed_models TEXT   NOT NULL,
    -- Tokens; 0: any number.
    day_budget     BIGINT NOT NULL,
    month_budget   BIGINT NOT NULL,
    create_time    BIGINT NOT NULL,
    expire_time    BIGINT,
    revoke_time    BIGINT,
    -- Of texts that are gone; those that are alive know their own.
    last_use_time  BIGINT
);
INSERT INTO keys_with_budgets
SELECT key_id, name, owner, scopes, rate_limits, allowed_models, 0, 0, create_time, expire_time, revoke_time, NULL
FROM keys;
DROP TABLE keys;
ALTER TABLE keys_with_budgets RENAME TO keys;
CREATE INDEX keys_newest_first ON keys (create_time DESC, key_id DESC);
CREATE INDEX keys_of_an_owner ON keys (owner, create_time DESC, key_id DESC);

CREATE TABLE users (
    user_id       TEXT   NOT NULL PRIMARY KEY,
    -- In lower case.
    email         TEXT   NOT NULL UNIQUE,
    name          TEXT   NOT NULL,
    -- argon2id in PHC form.
    password_hash TEXT,
    -- Who it is at the identity provider: issuer and subject.
    identity      TEXT UNIQUE,
    scopes        TEXT   NOT NULL,
    day_budget    BIGINT NOT NULL,
    month_budget  BIGINT NOT NULL,
    -- JSON.
    profile       TEXT   NOT NULL,
    create_time   BIGINT NOT NULL,
    update_time   BIGINT NOT NULL
);
CREATE INDEX users_newest_first ON users (create_time DESC, user_id DESC);

CREATE TABLE sessions (
    session_id   TEXT   NOT NULL PRIMARY KEY,
    user_id      TEXT   NOT NULL,
    method       TEXT   NOT NULL,
    address      TEXT   NOT NULL,
    create_time  BIGINT NOT NULL,
    refresh_time BIGINT NOT NULL,
    expire_time  BIGINT NOT NULL,
    revoke_time  BIGINT
);
CREATE INDEX sessions_of_a_user ON sessions (user_id, create_time DESC);
CREATE INDEX sessions_by_end ON sessions (expire_time);

CREATE TABLE refresh_tokens (
    -- As of key_texts.
    hash        TEXT   NOT NULL PRIMARY KEY,
    session_id  TEXT   NOT NULL,
    create_time BIGINT NOT NULL,
    -- A second use ends the session.
    use_time    BIGINT
);
CREATE INDEX refresh_tokens_of_a_session ON refresh_tokens (session_id);

CREATE TABLE token_usage (
    -- key:… or user:…
    payer    TEXT   NOT NULL,
    -- 2026-01-31 or 2026-01, of UTC.
    period   TEXT   NOT NULL,
    used     BIGINT NOT NULL,
    reserved BIGINT NOT NULL,
    PRIMARY KEY (payer, period)
);

CREATE TABLE token_leases (
    lease_id    TEXT   NOT NULL PRIMARY KEY,
    key_id      TEXT   NOT NULL,
    user_id     TEXT   NOT NULL,
    tokens      BIGINT NOT NULL,
    -- The day whose budgets hold it.
    day         TEXT   NOT NULL,
    -- 0: held; 1: given back unsettled; 2: settled.
    state       BIGINT NOT NULL,
    expire_time BIGINT NOT NULL
);
CREATE INDEX token_leases_by_end ON token_leases (state, expire_time);

-- Append-only: nothing ever updates or deletes here.
CREATE TABLE audit (
    sequence   BIGINT NOT NULL PRIMARY KEY,
    time       BIGINT NOT NULL,
    actor      TEXT   NOT NULL,
    owner      TEXT   NOT NULL,
    address    TEXT   NOT NULL,
    action     TEXT   NOT NULL,
    subject    TEXT   NOT NULL,
    request_id TEXT   NOT NULL,
    detail     TEXT   NOT NULL,
    -- For caches of credentials. 0: nothing; 1: ask again; 2: and end calls in progress.
    effect     BIGINT NOT NULL,
    -- SHA-256 over the hash before and the columns above.
    hash       TEXT   NOT NULL
);
CREATE INDEX audit_of_a_subject ON audit (subject, sequence);

-- One row: the end of the log. Whoever changes something locks it first, so that sequences are in
-- the order of commits.
CREATE TABLE audit_head (
    id       BIGINT NOT NULL PRIMARY KEY,
    sequence BIGINT NOT NULL,
    hash     TEXT   NOT NULL
);
INSERT INTO audit_head (id, sequence, hash) VALUES (1, 0, '');
