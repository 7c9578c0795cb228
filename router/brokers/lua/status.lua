-- Note what a person says of themselves, for as long as they are here.
-- KEYS: 1 nodes  2 here  3 statuses, as in `enter`    ARGV: 1 user  2 status, '' for none
-- Returns how many connections they have.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local nodes, connections, known = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES'), 0, false
for i = 1, #nodes, 2 do
  local count = redis.call('HGET', KEYS[2], nodes[i] .. ' ' .. ARGV[1])
  if count then
    known = true
    if tonumber(nodes[i + 1]) >= now then connections = connections + count end
  end
end
if known and ARGV[2] == '' then redis.call('HDEL', KEYS[3], ARGV[1]) end
if known and ARGV[2] ~= '' then redis.call('HSET', KEYS[3], ARGV[1], ARGV[2]) end
return connections
