-- Take a seat for one connection, counted over all nodes that are alive. A dead node's seats count no more.
-- KEYS: 1 nodes (zset: node -> end of its lease, ms)  2 in all  3 of the user  4 of the project (hashes: node -> count)
-- ARGV: 1 node  2-4 the limits in all, of a user, of a project
-- Returns '' or the limit that stands against it: system, user, project, lease.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local lease = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not lease or tonumber(lease) < now then return 'lease' end
local names = { 'system', 'user', 'project' }
for i, name in ipairs(names) do
  local counts, sum = redis.call('HGETALL', KEYS[i + 1]), 0
  for j = 1, #counts, 2 do
    local until_ = redis.call('ZSCORE', KEYS[1], counts[j])
    if until_ and tonumber(until_) >= now then
      sum = sum + tonumber(counts[j + 1])
    else
      redis.call('HDEL', KEYS[i + 1], counts[j])
    end
  end
  if sum >= tonumber(ARGV[i + 1]) then return name end
end
for i = 2, 4 do redis.call('HINCRBY', KEYS[i], ARGV[1], 1) end
return ''
