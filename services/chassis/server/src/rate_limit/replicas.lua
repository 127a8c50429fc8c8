-- Registers a replica in each of the groups in KEYS: sorted sets of replica ids by their last heartbeat.
-- ARGV: the replica's id, the lifetime of a heartbeat in milliseconds, 1 to leave the groups.
-- Returns for each group the number of replicas, and the number of replicas with a lower id.
local replica, lifetime, is_leaving = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1'
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local found = {}
for _, group in ipairs(KEYS) do
  redis.call('ZREMRANGEBYSCORE', group, '-inf', string.format('%d', now - lifetime))
  if is_leaving then
    redis.call('ZREM', group, replica)
  else
    redis.call('ZADD', group, string.format('%d', now), replica)
    redis.call('PEXPIRE', group, string.format('%d', lifetime))
  end
  local members, lower = redis.call('ZRANGE', group, 0, -1), 0
  for _, member in ipairs(members) do
    if member < replica then
      lower = lower + 1
    end
  end
  found[#found + 1] = #members
  found[#found + 1] = lower
end
return found
