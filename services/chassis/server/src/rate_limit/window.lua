-- Each replica reports with every request how many calls it has granted in its current window. That
-- number replaces what is stored for the replica, so a lost reply, a request that arrives twice, and
-- calls that were granted while Redis was away are all counted exactly once.
--
-- KEYS[1] holds "opened calls calls_before length". KEYS[2] maps a replica's id to "sequence opened
-- granted": its last request, and what it had granted in the window that opened then.
-- ARGV: limit, length, calls to decide (0: none), the replica's id, the request's sequence number; then
-- its report: when the window opened that it counts in (0: unknown), calls granted there, 1 if some of
-- them were granted without Redis, the age of that window.
-- Returns how many calls pass, what remains then, until the window ends, 0 or until another call passes,
-- when the window opened, and what the replica has granted in it; nothing for an outdated request.
--
-- Decides calls in a sliding window: the arithmetic of memory.rs, in milliseconds of Redis's clock.
--
-- Each request of a replica reports the number of calls that the replica has granted in its current window. It replaces
-- the stored number. So a lost reply, a duplicate request, and grants during an outage are counted exactly once.
--
-- KEYS[1] contains "opened calls previous_calls length". KEYS[2] maps a replica's id to "sequence opened granted": its
-- latest request, and its grants in the window that opened at that time.
-- ARGV: limit, length, number of calls to decide (may be 0), the replica's id, the sequence number of the request. Then
-- the report: start of the replica's window (0: unknown), calls granted in it, 1 if some were granted without Redis,
-- age of the window.
-- Returns the number of calls that pass, the remaining calls, the time until the window ends, the time until another
-- call passes (or 0), the start of the window, and the replica's grants in it. Returns nothing for an outdated request.
--
-- Each replica reports with every request how many calls it has granted in its current window. That
-- number replaces what is stored for the replica, so a lost reply, a request that arrives twice, and
-- calls that were granted while Redis was away are all counted exactly once.
--
-- KEYS[1] holds "opened calls calls_before length". KEYS[2] maps a replica's id to "sequence opened
-- granted": its last request, and what it had granted in the window that opened then.
-- ARGV: limit, length, calls to decide (0: none), the replica's id, the request's sequence number; then
-- its report: when the window opened that it counts in (0: unknown), calls granted there, 1 if some of
-- them were granted without Redis, the age of that window.
-- Returns how many calls pass, what remains then, until the window ends, 0 or until another call passes,
-- when the window opened, and what the replica has granted in it; nothing for an outdated request.
local limit, length, wanted = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local replica, sequence = ARGV[4], tonumber(ARGV[5])
local reported, granted = tonumber(ARGV[6]), tonumber(ARGV[7])
local has_unconfirmed, age = ARGV[8] == '1', tonumber(ARGV[9])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local own = redis.call('HGET', KEYS[2], replica) or ''
local own_sequence, own_opened, own_granted = string.match(own, '^(%d+) (%d+) (%d+)$')
own_sequence, own_opened, own_granted =
  tonumber(own_sequence), tonumber(own_opened), tonumber(own_granted)
if own_sequence and sequence < own_sequence then
  return {}
end

local kept = redis.call('GET', KEYS[1]) or ''
local opened, calls, before, was = string.match(kept, '^(%d+) (%d+) (%d+) (%d+)$')
local is_new = tonumber(was) ~= length or now >= opened + 2 * length
if is_new then
  opened, calls, before, own_opened = now, 0, 0, nil
  if granted > 0 and age < 2 * length then
    -- Redis has lost the window or never had it.
    opened = math.min(reported > 0 and reported or now - age, now)
    if now >= opened + 2 * length then
      opened = now
    end
  end
else
  -- If the clock is set back, the window must still end.
  opened, calls, before = math.min(opened, now), tonumber(calls), tonumber(before)
end
local is_rolled = now >= opened + length or (not is_new and reported == opened + length)
if is_rolled then
  -- A replica's clock may be slightly ahead, so that it is in the next window.
  opened, calls, before = opened + length, 0, calls
end

-- The window of the report. A replica that has granted calls locally may not know its start in Redis.
local target
if granted > 0 or reported > 0 then
  if reported == opened or reported == opened - length then
    target = reported
  elseif age < length then
    target = opened
  elseif age < 2 * length then
    target = opened - length
  end
end
local change, granted_here = 0, 0
if target then
  local known = 0
  if own_opened == target then
    known = own_granted
  elseif not has_unconfirmed and not is_new then
    -- The entry is lost, and Redis has confirmed all grants.
    known = granted
  end
  change = granted - known
  if target == opened then
    calls, granted_here = math.max(calls + change, 0), granted
  else
    before = math.max(before + change, 0)
  end
elseif reported == 0 and own_opened == opened then
  -- The replica has lost its count.
  granted_here = own_granted
end

local gone = math.max(now - opened, 0) / length
local free = limit - calls - math.floor(before * (1 - gone))
local passed = math.max(math.min(wanted, free), 0)
calls, free, granted_here = calls + passed, free - passed, granted_here + passed
local reset, wait = opened + length - now, 0
if free < 1 then
  local windows
  if calls < limit then
    windows = 1 - (limit - calls) / math.max(before, 1) - gone
  else
    windows = 2 - limit / calls - gone
  end
  wait = math.ceil(length * math.max(windows, 0)) + 1
end
if passed > 0 or change ~= 0 then
  local lifetime = string.format('%d', 2 * length)
  if is_new then
    redis.call('DEL', KEYS[2])
  end
  local state = string.format('%d %d %d %d', opened, calls, before, length)
  redis.call('SET', KEYS[1], state, 'PX', lifetime)
  if is_rolled then
    -- Remove entries of replicas that have left.
    local entries = redis.call('HGETALL', KEYS[2])
    for at = 1, #entries, 2 do
      local opened_then = tonumber(string.match(entries[at + 1], '^%d+ (%d+) %d+$')) or 0
      if opened_then < opened - length then
        redis.call('HDEL', KEYS[2], entries[at])
      end
    end
  end
  own = string.format('%d %d %d', sequence, opened, granted_here)
  redis.call('HSET', KEYS[2], replica, own)
  redis.call('PEXPIRE', KEYS[2], lifetime)
end
return { passed, math.max(free, 0), reset, wait, opened, granted_here }
