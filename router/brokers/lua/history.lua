-- Where a topic stands and what it remembers after a number, both of the same moment.
-- KEYS: 1 meta  2 log     ARGV: 1 after this number  2 epoch to begin with, should there be none  3 meta's life in ms
-- Returns { epoch, seq, entries }.
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if not epoch then
  epoch = ARGV[2]
  redis.call('DEL', KEYS[2])
  redis.call('HSET', KEYS[1], 'epoch', epoch, 'seq', 0)
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
local seq = tonumber(redis.call('HGET', KEYS[1], 'seq'))
if ARGV[1] == '' or tonumber(ARGV[1]) >= seq then return { epoch, seq, {} } end
return { epoch, seq, redis.call('XRANGE', KEYS[2], (tonumber(ARGV[1]) + 1) .. '-0', '+') }
