-- Clear away some of what one ended lease left behind. People who are nowhere else begin to leave.
-- KEYS: 1 nodes  2 leaving (zset: '<project> <user>' -> when it is told, ms)
-- ARGV: 1 at most so many entries  2 grace in ms
-- Returns 1 when there may be more to do, else 0.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local base = string.sub(KEYS[1], 1, -6)
local lease = redis.call('ZRANGEBYSCORE', KEYS[1], '(-' .. now, '(' .. now, 'LIMIT', 0, 1)[1]
if not lease then return 0 end
local nodes = redis.call('ZRANGE', KEYS[1], 0, -1)
local entries = redis.call('SPOP', base .. 'held:' .. lease, ARGV[1])
for _, entry in ipairs(entries) do
  local project, user = string.match(entry, '^here:(%S+) (.*)$')
  if project then
    local here = base .. 'here:' .. project
    redis.call('HDEL', here, lease .. ' ' .. user)
    local known = false
    for _, other in ipairs(nodes) do
      known = known or redis.call('HEXISTS', here, other .. ' ' .. user) == 1
    end
    if not known then
      redis.call('HSET', here, '- ' .. user, 0)
      redis.call('ZADD', KEYS[2], now + ARGV[2], project .. ' ' .. user)
    end
  else
    redis.call('HDEL', base .. entry, lease)
  end
end
if #entries < tonumber(ARGV[1]) then redis.call('ZREM', KEYS[1], lease) end
return 1
