-- Inserts an entry of the current cache generation, and evicts the oldest entries beyond the capacity.
-- KEYS: generation, index, entry. ARGV: generation, answer, time to live in milliseconds, capacity.
-- Returns the number of evicted entries.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('SET', KEYS[3], ARGV[1] .. ARGV[2], 'PX', ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZADD', KEYS[2], now + ARGV[3], KEYS[3])
local over = redis.call('ZCARD', KEYS[2]) - ARGV[4]
if over <= 0 then return 0 end
-- In steps if the capacity was lowered, because Redis serves no other client meanwhile.
local oldest = redis.call('ZPOPMIN', KEYS[2], math.min(over, 1000))
for at = 1, #oldest, 2 do redis.call('UNLINK', oldest[at]) end
return #oldest / 2
