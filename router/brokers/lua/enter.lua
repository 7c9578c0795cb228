-- One more connection of a person to a project.
-- KEYS: 1 nodes  2 entries of the lease  3 here (hash: '<lease> <user>' -> connections; '- <user>' -> node, while leaving)
--       4 statuses (hash: user -> text)  5 leaving (zset: '<project> <user>' -> when their grace is over, ms)
--       6 doubted (zset: '<project> <user>' -> when viewers are told once more, ms)
--       7 anew (hash: '<project> <user>' -> the node that is to tell that they joined; '-' when they were told as gone)
-- ARGV: 1 lease  2 project  3 user  4 ms after which what is under way has arrived  5 1 when this is a repeated try
-- Returns { '', 1 when they were nowhere before, else 0; their connections; their status }, or { 'lease' } when the
-- lease has ended, { 'again' } when the try before may have done it.
if ARGV[5] == '1' then return { 'again' } end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local lease, user, who = ARGV[1], ARGV[3], ARGV[2] .. ' ' .. ARGV[3]
local ends = redis.call('ZSCORE', KEYS[1], lease)
if not ends or tonumber(ends) < now then return { 'lease' } end
local node, elsewhere = string.match(lease, '^(.*)%.'), false
local nodes, connections, known = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES'), 1, false
for i = 1, #nodes, 2 do
  local count = redis.call('HGET', KEYS[3], nodes[i] .. ' ' .. user)
  if count then
    known = true
    elsewhere = elsewhere or string.match(nodes[i], '^(.*)%.') ~= node
    if tonumber(nodes[i + 1]) >= now then connections = connections + count end
  end
end
local went = redis.call('HGET', KEYS[3], '- ' .. user)
if went then
  redis.call('HDEL', KEYS[3], '- ' .. user)
  redis.call('ZREM', KEYS[5], who)
  known, elsewhere = true, elsewhere or went ~= node
end
redis.call('HINCRBY', KEYS[3], lease .. ' ' .. user, 1)
redis.call('SADD', KEYS[2], 'here:' .. who)
-- What two nodes tell may change places on its way: the last word is said when all of it has arrived.
if elsewhere or redis.call('ZSCORE', KEYS[6], who) then redis.call('ZADD', KEYS[6], now + ARGV[4], who) end
if not known and redis.call('HEXISTS', KEYS[7], who) == 0 then redis.call('HSET', KEYS[7], who, node) end
return { '', known and 0 or 1, connections, redis.call('HGET', KEYS[4], user) or '' }
