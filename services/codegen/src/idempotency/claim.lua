-- Returns the reply to a key, or claims the key.
-- KEYS: record, claim. ARGV: token of the requester, TTL of the lease in milliseconds.
-- Result: "known" and the record, "claimed", or "busy" while another holder owns the lease.
local record = redis.call('GET', KEYS[1])
if record then return {'known', record} end
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[1] then return {'busy', ''} end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
return {'claimed', ''}
