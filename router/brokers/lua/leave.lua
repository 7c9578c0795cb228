-- One connection less of a person to a project. With the last one, on whatever node, their grace begins.
-- KEYS: 1 nodes  2 entries of the lease  3 here  4 statuses  5 leaving  6 doubted  7 anew, all as in `enter`
-- ARGV: 1 lease  2 project  3 user  4 ms after which what is under way has arrived  5 grace in ms
--       6 1 when this is a repeated try
-- Returns { '', their connections, their status }, { 'lease' } or { 'again' }.
if ARGV[6] == '1' then return { 'again' } end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local lease, user, who = ARGV[1], ARGV[3], ARGV[2] .. ' ' .. ARGV[3]
local ends = redis.call('ZSCORE', KEYS[1], lease)
if not ends or tonumber(ends) < now then return { 'lease' } end
if redis.call('HINCRBY', KEYS[3], lease .. ' ' .. user, -1) <= 0 then
  redis.call('HDEL', KEYS[3], lease .. ' ' .. user)
  redis.call('SREM', KEYS[2], 'here:' .. who)
end
local node, elsewhere = string.match(lease, '^(.*)%.'), false
local nodes, connections, known = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES'), 0, false
for i = 1, #nodes, 2 do
  local count = redis.call('HGET', KEYS[3], nodes[i] .. ' ' .. user)
  if count then
    known = true
    elsewhere = elsewhere or string.match(nodes[i], '^(.*)%.') ~= node
    if tonumber(nodes[i + 1]) >= now then connections = connections + count end
  end
end
if not known then
  redis.call('HSET', KEYS[3], '- ' .. user, node)
  redis.call('ZADD', KEYS[5], now + ARGV[5], who)
end
-- Others hold this person: they tell what is so even if this node dies before it does.
if elsewhere or redis.call('ZSCORE', KEYS[6], who) then redis.call('ZADD', KEYS[6], now + ARGV[4], who) end
return { '', connections, redis.call('HGET', KEYS[4], user) or '' }
