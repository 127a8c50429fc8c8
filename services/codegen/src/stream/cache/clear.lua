-- Starts another cache generation, in which no earlier entry is found, and removes some of the entries.
-- KEYS: generation, index. ARGV: the generation to start, or "" to continue removing; number of entries to remove.
-- Returns the number of removed entries and of those left.
if ARGV[1] ~= '' then redis.call('SET', KEYS[1], ARGV[1]) end
local some = redis.call('ZPOPMIN', KEYS[2], ARGV[2])
for at = 1, #some, 2 do redis.call('UNLINK', some[at]) end
return {#some / 2, redis.call('ZCARD', KEYS[2])}
