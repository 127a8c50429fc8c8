-- API keys. Times are microseconds since 1970 (UTC); lists are JSON.
CREATE TABLE keys (
    key_id         TEXT   NOT NULL PRIMARY KEY,
    -- HMAC-SHA-256 with the pepper over the SHA-256 of the key's text, in hex.
    hash           TEXT   NOT NULL UNIQUE,
    name           TEXT   NOT NULL,
    owner          TEXT   NOT NULL,
    scopes         TEXT   NOT NULL,
    rate_limits    TEXT   NOT NULL,
    allowed_models TEXT   NOT NULL,
    create_time    BIGINT NOT NULL,
    expire_time    BIGINT,
    revoke_time    BIGINT
);

CREATE INDEX keys_newest_first ON keys (create_time DESC, key_id DESC);
