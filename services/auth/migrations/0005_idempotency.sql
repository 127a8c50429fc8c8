-- Replies to requests with an idempotency key.
CREATE TABLE idempotency_records (
    -- Derived from the pepper, the caller, the method and the idempotency key, in hex.
    record_id   TEXT   NOT NULL PRIMARY KEY,
    -- The hash of the request and the reply, encrypted with AES-256-GCM under a key that is derived
    -- alike, in hex.
    reply       TEXT   NOT NULL,
    expire_time BIGINT NOT NULL
);
CREATE INDEX idempotency_records_by_end ON idempotency_records (expire_time);
