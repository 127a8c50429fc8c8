-- The row of who ever met a cause (start 0) also has when that was last: so one row, and not one an
-- hour, says who met it in a period. Rows of hours are no longer written; the purge removes them.
UPDATE error_owners SET last_time = met.newest
FROM (SELECT fingerprint AS cause, owner AS who, MAX(last_time) AS newest
      FROM error_owners GROUP BY fingerprint, owner) AS met
WHERE error_owners.fingerprint = met.cause
  AND error_owners.owner = met.who
  AND error_owners.start = 0;

-- Only rows of hours are looked for by it. And PostgreSQL took it for the others too, where its
-- statistics were older than most of what they have in it.
CREATE INDEX error_owners_of_hours ON error_owners (last_time) WHERE start > 0;
DROP INDEX error_owners_oldest;
