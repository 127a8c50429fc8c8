-- Stores the first reply to a key and ends the lease. Evicts the oldest replies beyond the limits.
-- KEYS: record, claim, index of the caller, index of all, bytes of all.
-- ARGV: token, record, TTL in milliseconds, maximum records, maximum bytes, maximum records of a caller.
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
if redis.call('EXISTS', KEYS[1]) == 1 then return end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- A member of an index contains the record's key, its size and the index of its caller.
local function remove_members(members, unlink)
  for _, member in ipairs(members) do
    local name, bytes, caller = string.match(member, '^(%S+) (%S+) (%S+)$')
    if unlink then redis.call('UNLINK', name) end
    redis.call('ZREM', KEYS[4], member)
    redis.call('ZREM', caller, member)
    redis.call('DECRBY', KEYS[5], bytes)
  end
end
-- Expired records do not exist any longer, or were replaced. In steps, because a script blocks Redis.
remove_members(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', now, 'LIMIT', 0, 1000), false)

redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
local member = KEYS[1] .. ' ' .. #ARGV[2] .. ' ' .. KEYS[3]
redis.call('ZADD', KEYS[4], now + ARGV[3], member)
redis.call('ZADD', KEYS[3], now + ARGV[3], member)
redis.call('PEXPIRE', KEYS[3], ARGV[3])
local bytes = redis.call('INCRBY', KEYS[5], #ARGV[2])
local over = redis.call('ZCARD', KEYS[3]) - ARGV[6]
if over > 0 then remove_members(redis.call('ZRANGE', KEYS[3], 0, over - 1), true) end
over = redis.call('ZCARD', KEYS[4]) - ARGV[4]
if over > 0 then remove_members(redis.call('ZRANGE', KEYS[4], 0, over - 1), true) end
while bytes > tonumber(ARGV[5]) do
  local oldest = redis.call('ZRANGE', KEYS[4], 0, 0)
  if #oldest == 0 then break end
  remove_members(oldest, true)
  bytes = tonumber(redis.call('GET', KEYS[5]))
end
