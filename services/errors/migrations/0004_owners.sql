-- What belongs to an owner can be shown to that owner alone: its own occurrences, what it met of a cause,
-- and its own counts. Times are microseconds since 1970 (UTC).

-- '': nobody's, or stored before this step or by a replica of the version before. Of those the owner is in
-- error_details, from where it is copied in small steps: one statement for all would hold up the start.
ALTER TABLE error_occurrences ADD COLUMN owner TEXT NOT NULL DEFAULT '';

CREATE INDEX error_occurrences_of_owner ON error_occurrences (owner, fingerprint, time DESC)
WHERE owner <> '';

-- Of the row of an owner and a cause (start 0). A replica of the version before leaves the defaults.
ALTER TABLE error_owners ADD COLUMN total BIGINT NOT NULL DEFAULT 1;
ALTER TABLE error_owners ADD COLUMN recovered_count BIGINT NOT NULL DEFAULT 0;
-- 0: before last_time.
ALTER TABLE error_owners ADD COLUMN first_seen BIGINT NOT NULL DEFAULT 0;
ALTER TABLE error_owners ADD COLUMN last_seen BIGINT NOT NULL DEFAULT 0;
-- The version of the occurrence that was seen last.
ALTER TABLE error_owners ADD COLUMN last_version TEXT NOT NULL DEFAULT '';
-- What this owner was told. Owners who meet one cause may have been told different things.
ALTER TABLE error_owners ADD COLUMN message TEXT NOT NULL DEFAULT '';

UPDATE error_owners SET total = met.total, recovered_count = met.recovered_count,
    first_seen = met.first_seen, last_seen = met.last_seen
FROM (SELECT o.fingerprint AS cause, d.owner AS who, COUNT(*) AS total,
             CAST(SUM(d.recovered) AS BIGINT) AS recovered_count,
             MIN(o.time) AS first_seen, MAX(o.time) AS last_seen
      FROM error_occurrences o JOIN error_details d ON d.sequence = o.sequence
      WHERE d.owner <> '' GROUP BY o.fingerprint, d.owner) AS met
WHERE error_owners.fingerprint = met.cause
  AND error_owners.owner = met.who
  AND error_owners.start = 0;

UPDATE error_owners SET last_version = d.version, message = t.words
FROM error_occurrences AS o, error_details AS d, error_texts AS t
WHERE error_owners.start = 0
  AND o.fingerprint = error_owners.fingerprint
  AND o.time = error_owners.last_seen
  AND d.sequence = o.sequence
  AND d.owner = error_owners.owner
  AND t.hash = d.message;

CREATE INDEX error_owners_of_owner ON error_owners (owner, fingerprint) WHERE start = 0;

-- As error_counts, of one owner.
CREATE TABLE error_owner_counts (
    owner       TEXT   NOT NULL,
    width       BIGINT NOT NULL,
    start       BIGINT NOT NULL,
    fingerprint TEXT   NOT NULL,
    total       BIGINT NOT NULL,
    PRIMARY KEY (owner, width, start, fingerprint)
);

CREATE INDEX error_owner_counts_oldest ON error_owner_counts (width, start);

INSERT INTO error_owner_counts (owner, width, start, fingerprint, total)
SELECT d.owner, 3600000000, o.time - o.time % 3600000000, o.fingerprint, COUNT(*)
FROM error_occurrences o JOIN error_details d ON d.sequence = o.sequence
WHERE d.owner <> ''
GROUP BY d.owner, o.time - o.time % 3600000000, o.fingerprint;

INSERT INTO error_owner_counts (owner, width, start, fingerprint, total)
SELECT owner, 86400000000, start - start % 86400000000, fingerprint, CAST(SUM(total) AS BIGINT)
FROM error_owner_counts WHERE width = 3600000000
GROUP BY owner, start - start % 86400000000, fingerprint;
