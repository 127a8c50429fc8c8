-- One-way fingerprints of the peppers that stored credentials count under: what is hashed with another one is unknown.
CREATE TABLE pepper_fingerprints (
    fingerprint TEXT   NOT NULL PRIMARY KEY,
    record_time BIGINT NOT NULL
);
