-- Let a lease that was written down count from now on, and end all earlier ones of its node in the same moment.
-- KEYS: 1 nodes    ARGV: 1 lease ('<node>.<number>')  2 its length in ms
-- Returns 1; 0 when the lease has ended.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local ends = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not ends or math.abs(ends) < now then return 0 end
local node, number = string.match(ARGV[1], '^(.*)%.(%d+)$')
for _, other in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local its_node, its_number = string.match(other, '^(.*)%.(%d+)$')
  if its_node == node and tonumber(its_number) < tonumber(number) then redis.call('ZADD', KEYS[1], 0, other) end
end
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
return 1
