-- Let a lease that was written down count from now on, and end all earlier ones of its node in the same moment.
-- KEYS: 1 nodes    ARGV: 1 lease ('<node>.<number>')  2 its length in ms
-- Returns 1; 2 when none of the earlier ones counted any more; 0 when the lease has ended.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local ends = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not ends or math.abs(ends) < now then return 0 end
local node, number = string.match(ARGV[1], '^(.*)%.(%d+)$')
local nodes, answer = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES'), 2
for i = 1, #nodes, 2 do
  local its_node, its_number = string.match(nodes[i], '^(.*)%.(%d+)$')
  if its_node == node and tonumber(its_number) < tonumber(number) then
    if tonumber(nodes[i + 1]) >= now then answer = 1 end
    redis.call('ZADD', KEYS[1], 0, nodes[i])
  end
end
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
return answer
