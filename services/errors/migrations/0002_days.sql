-- error_counts also has days (width 86400000000): a report of 30 days reads them, not 720 hours.
INSERT INTO error_counts (width, start, fingerprint, total)
SELECT 86400000000, start - start % 86400000000, fingerprint, CAST(SUM(total) AS BIGINT)
FROM error_counts
WHERE width = 3600000000
GROUP BY start - start % 86400000000, fingerprint;
