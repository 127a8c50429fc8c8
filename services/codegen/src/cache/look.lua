-- The era, and the answer where it is of this era.
-- KEYS: era, entry. ARGV: the era to begin where there is none, whether the answer is wanted.
local era = redis.call('GET', KEYS[1])
if not era then
  -- Nobody has asked yet, or Redis has lost it: what was kept before can't be told from what was cleared.
  era = ARGV[1]
  redis.call('SET', KEYS[1], era)
end
if ARGV[2] == '0' then return {era, ''} end
local kept = redis.call('GET', KEYS[2])
if not kept or string.sub(kept, 1, #era) ~= era then return {era, ''} end
return {era, string.sub(kept, #era + 1)}
