-- Take over to tell of people whose grace is over, and of those of whom viewers may believe what is not so.
-- Whoever is taken over is handed out again, to any node, unless `told` says in time that it was done.
-- KEYS: 1 nodes  2 leaving  3 doubted  4 anew, as in `enter`    ARGV: 1 at most so many  2 time for telling, ms
-- Returns of each { '<project> <user>', the mark for `told`, 1 when they may be taken for gone or were not told as
-- joined, 1 when they are here, their connections, their status }.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local base, nodes = string.sub(KEYS[1], 1, -6), redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
local function find(project, user)
  local connections, known = 0, false
  for i = 1, #nodes, 2 do
    local count = redis.call('HGET', base .. 'here:' .. project, nodes[i] .. ' ' .. user)
    if count then
      known = true
      if tonumber(nodes[i + 1]) >= now then connections = connections + count end
    end
  end
  return known, connections
end
for _, who in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, ARGV[1])) do
  local project, user = string.match(who, '^(%S+) (.*)$')
  redis.call('ZREM', KEYS[2], who)
  redis.call('HDEL', base .. 'here:' .. project, '- ' .. user)
  if not find(project, user) then
    redis.call('HDEL', base .. 'status:' .. project, user)
    redis.call('HSET', KEYS[4], who, '-')
    redis.call('ZADD', KEYS[3], now, who)
  end
end
-- The half tells a mark from all times that others write.
local mark, found = string.format('%.1f', now + ARGV[2] + 0.5), {}
for _, who in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, ARGV[1])) do
  local project, user = string.match(who, '^(%S+) (.*)$')
  local known, connections = find(project, user)
  known = known or redis.call('HEXISTS', base .. 'here:' .. project, '- ' .. user) == 1
  redis.call('ZADD', KEYS[3], mark, who)
  found[#found + 1] = {
    who, mark, redis.call('HEXISTS', KEYS[4], who), known and 1 or 0, connections,
    redis.call('HGET', base .. 'status:' .. project, user) or '',
  }
end
return found
