-- Take a seat for one connection, counted over all leases that have not ended.
-- KEYS: 1 nodes  2 entries of the lease  3 in all  4 of the user  5 of the project (hashes: lease -> seats)
-- ARGV: 1 lease  2-4 the limits in all, of a user, of a project  5 user  6 what a node's own channel begins with
--       7 1 when this is a repeated try
-- Returns { what stands against it, 1 when the user has seats on another node, too }. What: '' nothing; `system`,
-- `user`, `project` a limit; `lease` the lease has ended; `again` the try before may have taken one.
if ARGV[7] == '1' then return { 'again', 0 } end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local alive, mine = redis.call('ZRANGEBYSCORE', KEYS[1], now, '+inf'), false
for _, lease in ipairs(alive) do mine = mine or lease == ARGV[1] end
if not mine then return { 'lease', 0 } end
local node, elsewhere = string.match(ARGV[1], '^(.*)%.'), {}
for i, name in ipairs({ 'system', 'user', 'project' }) do
  local seats = 0
  for j, count in ipairs(redis.call('HMGET', KEYS[i + 2], unpack(alive))) do
    seats = seats + (count or 0)
    local other = string.match(alive[j], '^(.*)%.')
    if count and name == 'user' and other ~= node then elsewhere[#elsewhere + 1] = other end
  end
  if seats >= tonumber(ARGV[i + 1]) then return { name, 0 } end
end
for i = 3, 5 do
  redis.call('HINCRBY', KEYS[i], ARGV[1], 1)
  redis.call('SADD', KEYS[2], string.sub(KEYS[i], #KEYS[1] - 4))
end
for _, other in ipairs(elsewhere) do redis.call('PUBLISH', ARGV[6] .. other, 'elsewhere ' .. ARGV[5]) end
return { '', #elsewhere > 0 and 1 or 0 }
