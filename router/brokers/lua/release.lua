-- Give a seat back.
-- KEYS: 1 nodes  2 entries of the lease  3 in all  4 of the user  5 of the project (hashes: lease -> seats)
-- ARGV: 1 lease  2 1 when this is a repeated try
-- Returns { '' }; { 'lease' } when the lease has ended; { 'again' } when the try before may have done it.
if ARGV[2] == '1' then return { 'again' } end
local t = redis.call('TIME')
local ends = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not ends or tonumber(ends) < t[1] * 1000 + math.floor(t[2] / 1000) then return { 'lease' } end
for i = 3, 5 do
  if redis.call('HINCRBY', KEYS[i], ARGV[1], -1) <= 0 then
    redis.call('HDEL', KEYS[i], ARGV[1])
    redis.call('SREM', KEYS[2], string.sub(KEYS[i], #KEYS[1] - 4))
  end
end
return { '' }
