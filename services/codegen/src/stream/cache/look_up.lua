-- Returns the cache generation, and the entry if it is of this generation.
-- KEYS: generation, entry. ARGV: the generation to start if there is none, whether the entry is wanted.
local generation = redis.call('GET', KEYS[1])
if not generation then
  -- The first lookup, or Redis has lost the generation: cleared entries cannot be told from others.
  generation = ARGV[1]
  redis.call('SET', KEYS[1], generation)
end
if ARGV[2] == '0' then return {generation, ''} end
local entry = redis.call('GET', KEYS[2])
if not entry or string.sub(entry, 1, #generation) ~= generation then return {generation, ''} end
return {generation, string.sub(entry, #generation + 1)}
