-- Say something to one node, or to all. KEYS: 1 channel    ARGV: 1 what  2 1 when this is a repeated try
if ARGV[2] == '1' then return 0 end
return redis.call('PUBLISH', KEYS[1], ARGV[1])
