-- One decision in a sliding window: the arithmetic of memory.rs, in milliseconds of Redis's own clock.
-- KEYS[1] holds "opened calls calls_before length". ARGV: limit, length, 1 to count the call.
-- Returns what remains, until the window ends, and 0 or until a call will pass.
local limit, length = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local kept = redis.call('GET', KEYS[1]) or ''
local opened, calls, before, was = string.match(kept, '^(%d+) (%d+) (%d+) (%d+)$')
if tonumber(was) ~= length or now >= opened + 2 * length then
  opened, calls, before = now, 0, 0
else
  -- A clock that was set back must not keep a window open.
  opened, calls, before = math.min(opened, now), tonumber(calls), tonumber(before)
  if now >= opened + length then
    opened, calls, before = opened + length, 0, calls
  end
end

local gone = (now - opened) / length
local free = limit - calls - math.floor(before * (1 - gone))
local reset = opened + length - now
if free < 1 then
  local windows
  if calls < limit then
    windows = 1 - (limit - calls) / math.max(before, 1) - gone
  else
    windows = 2 - limit / calls - gone
  end
  return { 0, reset, math.ceil(length * math.max(windows, 0)) + 1 }
end
if ARGV[3] == '1' then
  free = free - 1
  local state = string.format('%d %d %d %d', opened, calls + 1, before, length)
  redis.call('SET', KEYS[1], state, 'PX', string.format('%d', 2 * length))
end
return { free, reset, 0 }
