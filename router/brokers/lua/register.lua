-- Write down what a node holds, under a new lease that does not count yet: its end stands in `nodes` as a negative
-- number until `begin`. Counts are whole, so that a repeated try changes nothing.
-- KEYS: 1 nodes  2 entries of the lease  3 leaving  4 epoch of all that is kept here  5 anew, as in `enter`
-- ARGV: 1 lease  2 its length in ms  3 epoch to begin with, should there be none  then entry, count, entry, count ...
-- Returns { epoch, entries ('here:<project> <user>') of people of whom nothing was known, entries of those who are
-- known but will count otherwise than they do now }; {} when the lease has ended.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local lease, base = ARGV[1], string.sub(KEYS[1], 1, -6)
local ends = redis.call('ZSCORE', KEYS[1], lease)
if ends and -ends < now then return {} end
redis.call('ZADD', KEYS[1], -(now + ARGV[2]), lease)
redis.call('SET', KEYS[4], ARGV[3], 'NX')
local node, others, unknown, changed = string.match(lease, '^(.*)%.'), {}, {}, {}
local nodes, before = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES'), nil
for i = 1, #nodes, 2 do  -- what this node began to write down before, and did not end, says nothing
  local own, score = string.match(nodes[i], '^(.*)%.') == node, tonumber(nodes[i + 1])
  if not own or score >= 0 then others[#others + 1] = nodes[i] end
  if own and score >= now then before = nodes[i] end
end
for i = 4, #ARGV - 2, 2 do
  local entry, count = ARGV[i], ARGV[i + 1]
  redis.call('SADD', KEYS[2], entry)
  local project, user = string.match(entry, '^here:(%S+) (.*)$')
  if project then
    local here = base .. 'here:' .. project
    local known = redis.call('HDEL', here, '- ' .. user) == 1
    redis.call('ZREM', KEYS[3], project .. ' ' .. user)
    for _, other in ipairs(others) do
      known = known or redis.call('HEXISTS', here, other .. ' ' .. user) == 1
    end
    if not known then
      unknown[#unknown + 1] = entry
      redis.call('HSET', KEYS[5], project .. ' ' .. user, '-')
    elseif not before or redis.call('HGET', here, before .. ' ' .. user) ~= count then
      changed[#changed + 1] = entry
    end
    redis.call('HSET', here, lease .. ' ' .. user, count)
  else
    redis.call('HSET', base .. entry, lease, count)
  end
end
return { redis.call('GET', KEYS[4]), unknown, changed }
