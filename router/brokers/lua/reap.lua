-- Clear away some of what one ended lease left behind. People who are nowhere else begin to leave; of the others
-- viewers are told how many connections are left.
-- KEYS: 1 nodes  2 leaving  3 doubted, as in `enter`
-- ARGV: 1 at most so many entries  2 grace in ms  3 ms after which what is under way has arrived
-- Returns 1 when there may be more to do, else 0.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local base = string.sub(KEYS[1], 1, -6)
local lease = redis.call('ZRANGEBYSCORE', KEYS[1], '(-' .. now, '(' .. now, 'LIMIT', 0, 1)[1]
if not lease then return 0 end
local node = string.match(lease, '^(.*)%.')
local nodes = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
local entries = redis.call('SPOP', base .. 'held:' .. lease, ARGV[1])
for _, entry in ipairs(entries) do
  local project, user = string.match(entry, '^here:(%S+) (.*)$')
  if project then
    local here, who = base .. 'here:' .. project, project .. ' ' .. user
    redis.call('HDEL', here, lease .. ' ' .. user)
    local known, taken_over = false, false
    for i = 1, #nodes, 2 do
      if redis.call('HEXISTS', here, nodes[i] .. ' ' .. user) == 1 then
        known = true
        -- Its node lives, and has compared the counts of its two leases itself.
        taken_over = taken_over or (tonumber(nodes[i + 1]) >= now and string.match(nodes[i], '^(.*)%.') == node)
      end
    end
    if not known then
      redis.call('HSET', here, '- ' .. user, node)
      redis.call('ZADD', KEYS[2], now + ARGV[2], who)
    end
    if (known and not taken_over) or redis.call('ZSCORE', KEYS[3], who) then
      redis.call('ZADD', KEYS[3], now + ARGV[3], who)
    end
  else
    redis.call('HDEL', base .. entry, lease)
  end
end
if #entries < tonumber(ARGV[1]) then redis.call('ZREM', KEYS[1], lease) end
return 1
