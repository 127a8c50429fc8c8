-- The most that a generation may have used by its last report; booked when the lease ends unsettled.
ALTER TABLE token_leases ADD COLUMN used BIGINT NOT NULL DEFAULT 0;
