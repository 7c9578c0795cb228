-- Of some people viewers may believe what is not so: they are told once more, when what is under way has arrived.
-- KEYS: 1 nodes  2 doubted  3 anew, as in `enter`
-- ARGV: 1 ms after which what is under way has arrived, then of each '<project> <user>', 1 when they may be taken for
--       gone or were not told as joined, 1 when they are to be told also if nobody knows them
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local base, nodes = string.sub(KEYS[1], 1, -6), redis.call('ZRANGE', KEYS[1], 0, -1)
for i = 2, #ARGV - 1, 3 do
  local who = ARGV[i]
  local project, user = string.match(who, '^(%S+) (.*)$')
  local here = base .. 'here:' .. project
  local known = ARGV[i + 2] == '1' or redis.call('HEXISTS', here, '- ' .. user) == 1
  for _, lease in ipairs(nodes) do
    known = known or redis.call('HEXISTS', here, lease .. ' ' .. user) == 1
  end
  if known then
    redis.call('ZADD', KEYS[2], now + ARGV[1], who)
    if ARGV[i + 1] == '1' then redis.call('HSET', KEYS[3], who, '-') end
  end
end
return 1
