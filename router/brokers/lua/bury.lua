-- Make a message a dead letter, unless another consumer has taken it over.
-- KEYS: 1 messages of its kind  2 dead letters of its kind (streams)
-- ARGV: 1 group  2 consumer  3 entry  4 reason  5 most dead letters
local own = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2])
if own.err or #own == 0 then return 0 end
local entry = redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3])[1]
if entry then
  redis.call('XADD', KEYS[2], 'MAXLEN', ARGV[5], '*', 'g', ARGV[1], 'n', own[1][4], 'r', ARGV[4], unpack(entry[2]))
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
return 1
