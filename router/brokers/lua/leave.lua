-- One connection less of a person to a project. With the last one, on whatever node, their grace begins.
-- KEYS: 1 nodes  2 entries of the lease  3 here  4 statuses  5 leaving, all as in `enter`
-- ARGV: 1 lease  2 project  3 user  4 grace in ms  5 1 when this is a repeated try
-- Returns { '', their connections, their status }, { 'lease' } or { 'again' }.
if ARGV[5] == '1' then return { 'again' } end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local lease, user = ARGV[1], ARGV[3]
local ends = redis.call('ZSCORE', KEYS[1], lease)
if not ends or tonumber(ends) < now then return { 'lease' } end
if redis.call('HINCRBY', KEYS[3], lease .. ' ' .. user, -1) <= 0 then
  redis.call('HDEL', KEYS[3], lease .. ' ' .. user)
  redis.call('SREM', KEYS[2], 'here:' .. ARGV[2] .. ' ' .. user)
end
local nodes, connections, known = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES'), 0, false
for i = 1, #nodes, 2 do
  local count = redis.call('HGET', KEYS[3], nodes[i] .. ' ' .. user)
  if count then
    known = true
    if tonumber(nodes[i + 1]) >= now then connections = connections + count end
  end
end
if not known then
  redis.call('HSET', KEYS[3], '- ' .. user, 0)
  redis.call('ZADD', KEYS[5], now + ARGV[4], ARGV[2] .. ' ' .. user)
end
return { '', connections, redis.call('HGET', KEYS[4], user) or '' }
