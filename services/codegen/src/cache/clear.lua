-- Begins another era, in which nothing of the one before is found, and removes some of what is left.
-- KEYS: era, index. ARGV: the era to begin, "" to go on removing; how many to remove.
-- Returns how many were removed, and how many are left.
if ARGV[1] ~= '' then redis.call('SET', KEYS[1], ARGV[1]) end
local some = redis.call('ZPOPMIN', KEYS[2], ARGV[2])
for at = 1, #some, 2 do redis.call('UNLINK', some[at]) end
return {#some / 2, redis.call('ZCARD', KEYS[2])}
