-- Messages that a group has dealt with.
-- KEYS: the messages of each kind (streams)    ARGV: 1 group, then of each message the place of its key and its entry
for i = 2, #ARGV - 1, 2 do redis.call('XACK', KEYS[tonumber(ARGV[i])], ARGV[1], ARGV[i + 1]) end
return 1
