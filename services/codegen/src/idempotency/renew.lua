-- Makes a lease last longer, if it is still its holder's.
-- KEYS: claim. ARGV: token, milliseconds.
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
