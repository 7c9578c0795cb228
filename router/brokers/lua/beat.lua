-- Prolong a lease that has not ended.
-- KEYS: 1 nodes (zset: lease -> its end, ms)  2 in all (hash: lease -> seats)  3 entries of the lease (set)
-- ARGV: 1 lease  2 its length in ms
-- Returns { 1 or, when it has ended or is not known, 0; its seats; its entries }.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local ends = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not ends or tonumber(ends) < now then return { 0, 0, 0 } end
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
return { 1, tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or 0), redis.call('SCARD', KEYS[3]) }
