-- Take over to tell of people whose grace is over. Each is handed out once; the same number gets the same answer.
-- KEYS: 1 nodes  2 leaving  3 what was handed out to this node last (list: number, then people)
-- ARGV: 1 number of the asking, one more for each answer that came  2 at most so many  3 how long to remember, ms
-- Returns '<project> <user>' of each.
local last = redis.call('LRANGE', KEYS[3], 0, -1)
if table.remove(last, 1) == ARGV[1] then return last end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local due = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, ARGV[2])
if #due == 0 then return due end
local base, nodes, gone = string.sub(KEYS[1], 1, -6), redis.call('ZRANGE', KEYS[1], 0, -1), {}
for _, one in ipairs(due) do
  local project, user = string.match(one, '^(%S+) (.*)$')
  local here = base .. 'here:' .. project
  local known = false
  for _, lease in ipairs(nodes) do
    known = known or redis.call('HEXISTS', here, lease .. ' ' .. user) == 1
  end
  redis.call('ZREM', KEYS[2], one)
  redis.call('HDEL', here, '- ' .. user)
  if not known then
    redis.call('HDEL', base .. 'status:' .. project, user)
    gone[#gone + 1] = one
  end
end
redis.call('DEL', KEYS[3])
redis.call('RPUSH', KEYS[3], ARGV[1], unpack(gone))
redis.call('PEXPIRE', KEYS[3], ARGV[3])
return gone
