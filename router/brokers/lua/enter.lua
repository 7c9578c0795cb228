-- One more connection of a person to a project.
-- KEYS: 1 nodes  2 entries of the lease  3 here (hash: '<lease> <user>' -> connections; '- <user>' while leaving)
--       4 statuses (hash: user -> text)  5 leaving (zset: '<project> <user>' -> when it is told, ms)
-- ARGV: 1 lease  2 project  3 user  4 1 when this is a repeated try
-- Returns { '', 1 when they were nowhere before, else 0; their connections; their status }, or { 'lease' } when the
-- lease has ended, { 'again' } when the try before may have done it.
if ARGV[4] == '1' then return { 'again' } end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local lease, user = ARGV[1], ARGV[3]
local ends = redis.call('ZSCORE', KEYS[1], lease)
if not ends or tonumber(ends) < now then return { 'lease' } end
local nodes, connections, known = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES'), 1, false
for i = 1, #nodes, 2 do
  local count = redis.call('HGET', KEYS[3], nodes[i] .. ' ' .. user)
  if count then
    known = true
    if tonumber(nodes[i + 1]) >= now then connections = connections + count end
  end
end
if redis.call('HDEL', KEYS[3], '- ' .. user) == 1 then
  redis.call('ZREM', KEYS[5], ARGV[2] .. ' ' .. user)
  known = true
end
redis.call('HINCRBY', KEYS[3], lease .. ' ' .. user, 1)
redis.call('SADD', KEYS[2], 'here:' .. ARGV[2] .. ' ' .. user)
return { '', known and 0 or 1, connections, redis.call('HGET', KEYS[4], user) or '' }
