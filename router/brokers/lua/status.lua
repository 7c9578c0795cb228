-- Note what a person says of themselves, for as long as they are here.
-- KEYS: 1 nodes  2 here  3 statuses  4 doubted, as in `enter`
-- ARGV: 1 project  2 user  3 status, '' for none  4 node that asks  5 ms after which what is under way has arrived
-- Returns { how many connections they have; their status, which is kept only of people who are here }.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local user, who, elsewhere = ARGV[2], ARGV[1] .. ' ' .. ARGV[2], false
local nodes, connections, known = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES'), 0, false
for i = 1, #nodes, 2 do
  local count = redis.call('HGET', KEYS[2], nodes[i] .. ' ' .. user)
  if count then
    known = true
    elsewhere = elsewhere or string.match(nodes[i], '^(.*)%.') ~= ARGV[4]
    if tonumber(nodes[i + 1]) >= now then connections = connections + count end
  end
end
if known and ARGV[3] == '' then redis.call('HDEL', KEYS[3], user) end
if known and ARGV[3] ~= '' then redis.call('HSET', KEYS[3], user, ARGV[3]) end
if elsewhere or redis.call('ZSCORE', KEYS[4], who) then redis.call('ZADD', KEYS[4], now + ARGV[5], who) end
return { connections, redis.call('HGET', KEYS[3], user) or '' }
