-- Keeps an answer that was asked for in this era, and lets the oldest go beyond the capacity.
-- KEYS: era, index, entry. ARGV: era, answer, milliseconds to live, capacity.
-- Returns how many went before their time.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('SET', KEYS[3], ARGV[1] .. ARGV[2], 'PX', ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZADD', KEYS[2], now + ARGV[3], KEYS[3])
local over = redis.call('ZCARD', KEYS[2]) - ARGV[4]
if over <= 0 then return 0 end
-- A step at a time where the capacity was lowered: Redis serves nobody else meanwhile.
local oldest = redis.call('ZPOPMIN', KEYS[2], math.min(over, 1000))
for at = 1, #oldest, 2 do redis.call('UNLINK', oldest[at]) end
return #oldest / 2
