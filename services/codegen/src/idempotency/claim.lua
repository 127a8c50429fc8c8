-- The reply to a key, or the right to make it.
-- KEYS: record, claim. ARGV: token of who asks, milliseconds of a lease.
-- Returns "known" and the record, "claimed", or "busy" while another holds the lease.
local record = redis.call('GET', KEYS[1])
if record then return {'known', record} end
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[1] then return {'busy', ''} end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
return {'claimed', ''}
