-- End an epoch whose numbers have come to mean two things, once. KEYS: 1 meta
-- ARGV: 1 the epoch to end  2 its successor. Returns the epoch that holds now.
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if epoch == ARGV[1] then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[2], 'past', epoch .. ' 0 0 1 ')
  return ARGV[2]
end
return epoch
