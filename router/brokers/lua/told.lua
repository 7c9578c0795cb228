-- Viewers were told what was handed out by `untold`, or that somebody joined.
-- Who has changed meanwhile, or was taken over by another node, is told once more.
-- KEYS: 1 doubted  2 anew, as in `enter`
-- ARGV: 1 node  2 ms after which what is under way has arrived, then of each '<project> <user>', the mark ('' for
--       whoever joined), 1 when they were told as gone
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
for i = 3, #ARGV - 1, 3 do
  local who, mark = ARGV[i], ARGV[i + 1]
  if mark == '' then
    if redis.call('HGET', KEYS[2], who) == ARGV[1] then redis.call('HDEL', KEYS[2], who) end
  elseif tonumber(redis.call('ZSCORE', KEYS[1], who) or 0) == tonumber(mark) then
    redis.call('ZREM', KEYS[1], who)
    redis.call('HDEL', KEYS[2], who)
  else
    redis.call('ZADD', KEYS[1], now + ARGV[2], who)
    if ARGV[i + 2] == '1' then redis.call('HSET', KEYS[2], who, '-') end
  end
end
return 1
